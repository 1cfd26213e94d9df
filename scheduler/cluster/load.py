"""A step's plan as the cost model sees it: the same for live steps that are measured and simulated ones that are
predicted."""

from lora.adapter import AdapterRef
from scheduler.cluster.cost import AdapterLoad, StepLoad
from scheduler.plan import StepPlan


def load_of(plan: StepPlan) -> StepLoad:
    """Rows that continue a drawn sequence decode, the rest read prompts."""
    prompts: dict[AdapterRef, int] = {}
    decoding: dict[AdapterRef, int] = {}
    context = pairs = 0
    for part in plan.slices:
        ref, rows = part.request.adapter, len(part.token_ids)
        context += part.start + rows
        if rows == 1 and part.output_index > 0:
            decoding[ref] = decoding.get(ref, 0) + 1
        else:
            prompts[ref] = prompts.get(ref, 0) + rows
            pairs += rows * part.start + rows * (rows + 1) // 2
    refs = dict.fromkeys((*prompts, *decoding))
    parts = (AdapterLoad(ref.rank, prompts.get(ref, 0), decoding.get(ref, 0)) for ref in refs)
    return StepLoad(tuple(parts), context, pairs)

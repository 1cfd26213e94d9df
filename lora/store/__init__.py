"""Own adapters: what names mean, what is resident, and the loads between tiers."""

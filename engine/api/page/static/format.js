// Write numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** Write a size. */
export function bytes(count) {
  if (count === undefined || count === null) return "–";
  let value = count;
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${UNITS[unit]}`;
}

/** Write a duration. */
export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.0095) return `${(1000 * value).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(1000 * value)} ms`;
  return `${value.toFixed(value < 9.95 ? 2 : 1)} s`;
}

/** Write how long ago something was. */
export function ago(thenS, nowS) {
  const passed = Math.max(0, Math.round(nowS - thenS));
  if (passed < 60) return `${passed} s ago`;
  if (passed < 3600) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 86400) return `${Math.floor(passed / 3600)} h ago`;
  return `${Math.floor(passed / 86400)} days ago`;
}

/** Write a part of a whole. */
export function percent(part) {
  return part === null || part === undefined ? "–" : `${Math.round(100 * part)} %`;
}

/** Write a count, with its thousands apart. */
export function count(value) {
  return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en");
}

/** Estimate a percentile of durations that are counted by bounds; null where none was. */
export function percentile(counts, bounds, part) {
  const total = counts.reduce((sum, each) => sum + each, 0);
  if (total <= 0) return null;
  let before = 0;
  for (let at = 0; at < counts.length; at += 1) {
    if (counts[at] > 0 && before + counts[at] >= part * total) {
      const low = at === 0 ? 0 : bounds[at - 1];
      const high = at < bounds.length ? bounds[at] : bounds[bounds.length - 1];
      return low + (high - low) * ((part * total - before) / counts[at]);
    }
    before += counts[at];
  }
  return bounds[bounds.length - 1];
}

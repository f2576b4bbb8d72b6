// Numbers for people.

/** Return a number of bytes in decimal units, as `tp-runtime inspect` writes it. */
export function bytes(count) {
  if (count < 1000) return `${Math.round(count)} B`;
  if (count < 1e6) return `${(count / 1e3).toFixed(1)} kB`;
  return count < 1e9 ? `${(count / 1e6).toFixed(1)} MB` : `${(count / 1e9).toFixed(2)} GB`;
}

/** Return milliseconds, or seconds from ten of them on. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms >= 10000) return `${(ms / 1000).toFixed(1)} s`;
  return `${ms < 100 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

/** Return a count of tokens; a mean over layers may be no whole number. */
export function tokens(count) {
  const number = Number.isInteger(count) ? `${count}` : count.toFixed(1);
  return `${number} ${number === "1" ? "token" : "tokens"}`;
}

/** Return a figure with its standard error, rounded to the error's first two digits. */
export function figure(value, error) {
  if (error === undefined) return value.toFixed(3);
  const digits = error > 0 ? Math.min(6, Math.max(2, 1 - Math.floor(Math.log10(error)))) : 3;
  return `${value.toFixed(digits)} ± ${error.toFixed(digits)}`;
}

/** Return a share as a percentage, with more digits near 100 %, because 99.96 % is not 100 %. */
export function percent(share) {
  let digits = 1;
  while (share < 1 && digits < 4 && Number((100 * share).toFixed(digits)) === 100) digits += 1;
  return `${Number((100 * share).toFixed(digits))} %`;
}

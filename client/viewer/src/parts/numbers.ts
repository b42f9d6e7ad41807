// Numbers as the command prints them, so that a page and a terminal can be compared by eye.

/** `0.992`, `0.001`, `8e-10`: as many digits as tell it from 0 and from 1. */
export function probability(value: number): string {
  if (value >= 0.0005 || value === 0) return value.toFixed(3)
  return value.toExponential(0).replace(/-(\d)$/, '-0$1')
}

export function signed(value: number, digits = 2): string {
  return `${value < 0 ? '−' : '+'}${Math.abs(value).toFixed(digits)}`
}

/** A share of a sum: `43 %`, `−3 %`, `0.2 %`. */
export function percent(share: number): string {
  const size = Math.abs(share * 100)
  const digits = size >= 9.95 || size === 0 ? 0 : size >= 0.095 ? 1 : 2
  return `${share < 0 ? '−' : ''}${size.toFixed(digits)} %`
}

/** A count with thin spaces between thousands. */
export function count(value: number): string {
  return String(value).replace(/\B(?=(\d{3})+$)/g, '\u2009')
}

/** A norm: three digits, whatever its magnitude: `21.7`, `0.0526`, `6.05e-05`. */
export function measure(value: number): string {
  if (!Number.isFinite(value) || value === 0) return String(value)
  if (Math.abs(value) >= 1e-4) return String(Number(value.toPrecision(3)))
  return String(Number(value.toPrecision(3)).toExponential()).replace(/-(\d)$/, '-0$1')
}

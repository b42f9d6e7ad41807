import type { Ribbon } from './placing'

/** A band from one upright edge to another, its sides bent like the lines of a d3 link. */
export function band(ribbon: Ribbon, from = 0, to = 1): string {
  const { x0, x1 } = ribbon
  const middle = (x0 + x1) / 2
  const [a0, b0] = [ribbon.y0 + ribbon.h0 * from, ribbon.y0 + ribbon.h0 * to]
  const [a1, b1] = [ribbon.y1 + ribbon.h1 * from, ribbon.y1 + ribbon.h1 * to]
  return (
    `M${x0},${a0}C${middle},${a0},${middle},${a1},${x1},${a1}` +
    `L${x1},${b1}C${middle},${b1},${middle},${b0},${x0},${b0}Z`
  )
}

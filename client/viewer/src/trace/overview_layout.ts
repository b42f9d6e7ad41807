import { type Column, columnsIn, GUTTER, NARROWEST_LABEL } from '../presentation/svg'

// The layout of the overview: tokens from left to right, layers upwards from the embedding.

export interface Row {
  /** The layer, or -1 for the embedding. */
  layer: number
  y: number
}

export interface Layout {
  columns: Column[]
  rows: Row[]
  cellHeight: number
  width: number
  height: number
  /** Left edge of the panel with the target's rank and probability by layer. */
  panelX: number
  /** Whether the panel has only numbers, to leave room for tokens in a figure of one column. */
  slim: boolean
}

const SLIM_BELOW = 560 // px of the picture
const PANEL = 214
const SLIM_PANEL = 110

/** Width of the panel with the target's rank and probability. */
export function panelWidth(width: number): number {
  return width < SLIM_BELOW ? SLIM_PANEL : PANEL
}

export const EMBEDDING = -1

const TOP = 30

const AXIS = 38

const WIDEST_HEAD = 150
const LOWEST_PITCH = 16 // px; row labels do not overlap, and a token has room
const LOWEST_CELL = 17 // px; a label and its descenders
const SMALLEST = 264 // px of a matrix with few layers
const LEGENDS = 54 // px below the matrix

/** One column per position; `read` are the positions to label first if not all labels fit. */
export function layout(
  positions: number,
  layers: readonly number[],
  selected: number,
  width: number,
  read: readonly number[] = [],
): Layout {
  const pitch = rowPitch(layers.length)
  const cellHeight = Math.min(26, Math.max(LOWEST_CELL, Math.round(pitch * 0.58)))
  const slim = width < SLIM_BELOW
  const panelX = width - panelWidth(width)
  const columns = columnsIn(positions, selected, GUTTER, panelX - GUTTER - (slim ? 12 : 18), read)
  const rows = [EMBEDDING, ...layers].map((layer, i) => ({
    layer,
    y: TOP + (layers.length - i) * pitch,
  }))
  return {
    columns,
    rows,
    cellHeight,
    width,
    height: TOP + layers.length * pitch + cellHeight + AXIS,
    panelX: Math.min(panelX, lastEdge(columns) + (slim ? 18 : 26)),
    slim,
  }
}

/**
 * One row per layer, without the embedding, and one column per head. Cells are higher than in the
 * overview as there are no arcs, or lower to fit in `tallest` with their legend.
 */
export function headLayout(
  heads: number,
  layers: readonly number[],
  width: number,
  panel: number,
  tallest = Number.POSITIVE_INFINITY,
): Layout {
  const lowest = Math.max(LOWEST_PITCH, SMALLEST / layers.length)
  const fitting = (tallest - TOP - AXIS - LEGENDS) / layers.length
  const pitch = Math.min(rowPitch(layers.length), Math.max(lowest, fitting))
  const room = width - panel - GUTTER - 18
  const even = Math.min(WIDEST_HEAD, room / heads)
  const columns = Array.from({ length: heads }, (_, position) => ({
    position,
    x: GUTTER + position * even,
    width: even - Math.min(6, even * 0.15),
    labelled: even >= NARROWEST_LABEL,
  }))
  return {
    columns,
    rows: layers.map((layer, i) => ({ layer, y: TOP + (layers.length - 1 - i) * pitch })),
    cellHeight: pitch - Math.min(6, pitch * 0.15),
    width,
    height: TOP + layers.length * pitch + AXIS - 10,
    panelX: Math.min(width - panel, lastEdge(columns) + 26),
    slim: width < SLIM_BELOW,
  }
}

function rowPitch(layers: number): number {
  return Math.max(26, Math.min(54, Math.round(620 / (layers + 1))))
}

function lastEdge(columns: readonly Column[]): number {
  const last = columns.at(-1)
  return last ? last.x + last.width : GUTTER
}

/** The line from the marked residuals to their label; it turns before the numbers of the panel. */
export function flagLine(x: number, y: number, panelX: number, labelY: number): string {
  const turn = labelY === y ? '' : `H${panelX - 8}V${labelY}`
  return `M${x},${y}${turn}H${panelX + 12}`
}

/** The column and row nearest to a point. */
export function nearest(
  of: Layout,
  x: number,
  y: number,
): { column: Column; row: Row } | undefined {
  const column = closest(of.columns, (c) => distance(x, c.x, c.x + c.width))
  const row = closest(of.rows, (r) => distance(y, r.y, r.y + of.cellHeight))
  return column && row ? { column, row } : undefined
}

function distance(value: number, low: number, high: number): number {
  return Math.max(low - value, value - high, 0)
}

function closest<Item>(items: readonly Item[], far: (item: Item) => number): Item | undefined {
  let best: Item | undefined
  for (const item of items) if (!best || far(item) < far(best)) best = item
  return best
}

// Where the overview's cells stand: tokens along, layers upward, the embedding below.

export interface Column {
  position: number
  x: number
  width: number
  /** Wide enough for a token's text. */
  labelled: boolean
}

export interface Row {
  /** A block, or -1 for the embedding. */
  layer: number
  y: number
}

export interface Layout {
  columns: Column[]
  rows: Row[]
  cellHeight: number
  width: number
  height: number
  /** Left edge of the panel that follows one position over the layers. */
  panelX: number
}

export const EMBEDDING = -1
export const GUTTER = 46
const TOP = 30
const AXIS = 38
const GAP = 10
const NARROWEST_LABEL = 58
const WIDEST = 116
const WIDEST_HEAD = 150
const LENS = 10

/** As many columns as positions, all labelled where they fit; else a lens around the selected. */
export function layout(
  positions: number,
  layers: readonly number[],
  selected: number,
  width: number,
  panelWidth: number,
): Layout {
  const pitch = rowPitch(layers.length)
  const cellHeight = Math.min(26, Math.round(pitch * 0.58))
  const panelX = width - panelWidth
  const columns = columnsIn(positions, selected, GUTTER, panelX - GUTTER - 18)
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
    panelX: Math.min(panelX, lastEdge(columns) + 26),
  }
}

/** The same rows without the embedding, and a column for each head: higher, for there are no arcs. */
export function headLayout(
  heads: number,
  layers: readonly number[],
  width: number,
  panelWidth: number,
): Layout {
  const pitch = rowPitch(layers.length)
  const room = width - panelWidth - GUTTER - 18
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
    panelX: Math.min(width - panelWidth, lastEdge(columns) + 26),
  }
}

function rowPitch(layers: number): number {
  return Math.max(18, Math.min(54, Math.round(620 / (layers + 1))))
}

function lastEdge(columns: readonly Column[]): number {
  const last = columns.at(-1)
  return last ? last.x + last.width : GUTTER
}

export function columnsIn(
  positions: number,
  selected: number,
  left: number,
  room: number,
): Column[] {
  const even = Math.min(WIDEST, room / positions)
  if (even >= NARROWEST_LABEL || positions <= 3) {
    return Array.from({ length: positions }, (_, position) => ({
      position,
      x: left + position * even,
      width: even - GAP,
      labelled: true,
    }))
  }
  return lens(positions, selected, left, room)
}

/** Up to ten readable columns around the selected one; the others share what is left as a heat map. */
function lens(positions: number, selected: number, left: number, room: number): Column[] {
  const shown = Math.max(3, Math.min(LENS, Math.floor((room * 0.8) / NARROWEST_LABEL)))
  const others = Math.min(room * 0.3, (positions - shown) * 16)
  const wide = Math.min(84, (room - others - 2 * GAP) / shown)
  const narrow = Math.min(20, (room - wide * shown - 2 * GAP) / (positions - shown))
  const first = Math.max(0, Math.min(positions - shown, selected - Math.floor(shown * 0.7)))
  const columns: Column[] = []
  let x = left
  for (let position = 0; position < positions; position++) {
    const labelled = position >= first && position < first + shown
    if (position > 0 && (position === first || position === first + shown)) x += GAP
    const pitch = labelled ? wide : narrow
    const gap = labelled ? Math.min(GAP, 6) : Math.min(2, narrow * 0.2)
    columns.push({ position, x, width: pitch - gap, labelled })
    x += pitch
  }
  return columns
}

/** The column and row nearest to a point of the picture. */
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

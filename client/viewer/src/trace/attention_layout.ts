import { finite } from '../contract'
import type { FlowGraph } from '../model/flow_graph'
import { decimals, percent } from '../presentation/wording'
import { type Filter, passing } from './controls'
import type { Block, HeadRow } from './layer_model'
import {
  CHIP,
  type Detail,
  HEAD,
  heading,
  isWhole,
  neuronName,
  PAD,
  type Place,
  type Placed,
  placeHiddenRows,
  placeRemainder,
  placeSum,
  ROW,
  restLabel,
  type Stacked,
  shownShare,
  signedBar,
  summary,
} from './layer_pieces'

// Attention's block: for each head its query, its sources with their keys and values, and its
// output.

export interface Columns {
  chip: number
  query: number
  source: number
  key: number
  weight: number
  value: number
  output: number
  share: number
  /** Widths of the columns without chips. */
  sourceWidth: number
  weightWidth: number
}

const SPACES = { source: 78, weight: 56, share: 50, ribbons: 56 }
const NARROW_SPACES = { source: 60, weight: 52, share: 42, ribbons: 28 } // leave room for tokens
const NARROW = 560 // px
const GAP = 8 // between heads
const FRAME = 8 // above and below a head's lines

export function placeAttention(
  detail: Detail,
  block: Block<HeadRow>,
  graph: FlowGraph,
  filter: Filter,
  at: Place,
): Placed {
  const columns = columnsIn(at)
  const { shown, hidden, kept } = passing(block.rows, filter)
  const ofMixer = block.sum?.kind === 'MIXER_OUTPUT' // the number of its heads is not in `sizes`
  const all = ofMixer ? undefined : graph.sizes.nHeads
  const text = summary(block, block.rows.length, all, 'heads')
  heading(
    detail,
    at,
    block.output?.kind === 'MIXER_OUTPUT' ? 'Mixer' : 'Attention',
    block,
    [...text, ...shownShare(kept)],
    isWhole(block)
      ? []
      : ofMixer
        ? [[columns.output, 'head output']]
        : [
            [columns.query, 'query'],
            [columns.source, 'source'],
            [columns.key, 'key'],
            [columns.weight + (columns.weightWidth - 6) / 2, 'attention', 'middle'],
            [columns.value, 'value'],
            [columns.output, 'head output'],
          ],
  )
  const extra = ofMixer ? 0 : extraHeight(block, shown, filter, at.bar)
  const rows: Stacked[] = []
  let y = at.y + HEAD
  for (const row of shown) {
    const height = linesOf(row, filter) * ROW + FRAME + extra
    const below = outputHeight(row, filter)
    const left = columns.query - 8
    const width = columns.value + columns.chip + 8 - left
    detail.groups.push({ x: left, y, width, height: height + below })
    placeHead(detail, row, graph, filter, columns, y, height)
    if (below > 0) placeOutputRows(detail, row, block, columns, y + height)
    rows.push({ row, y: y + (height - ROW) / 2 })
    y += height + below + GAP
  }
  const ends = { x: columns.output, width: columns.chip, share: columns.share }
  const rest = restLabel(all, block.rows.length)
  y = placeRemainder(detail, rows, block, filter, ends, y, rest)
  return placeSum(
    detail,
    at,
    block,
    rows,
    ends,
    placeHiddenRows(detail, hidden, 'heads', ends, y) - GAP,
  )
}

function columnsIn(at: Place): Columns {
  const spaces = at.width < NARROW ? NARROW_SPACES : SPACES
  const taken = spaces.source + spaces.weight + spaces.share + spaces.ribbons + 34
  const chip = (at.width - 2 * PAD - taken) / 4
  const query = at.x + PAD
  const source = query + chip + 12
  const key = source + spaces.source
  const weight = key + chip + 6
  const value = weight + spaces.weight
  const output = value + chip + 16
  const widths = { sourceWidth: spaces.source, weightWidth: spaces.weight }
  const share = output + chip + spaces.share
  return { chip, query, source, key, weight, value, output, share, ...widths }
}

function linesOf(row: HeadRow, filter: Filter): number {
  if (row.node.kind === 'MIXER_HEAD') return 1 // it has neither a query nor sources
  const last = hasRest(row, filter) || row.outputRows.length > 0 // both are in the last line
  return Math.max(2, row.sources.length + (last ? 1 : 0))
}

function hasRest(row: HeadRow, filter: Filter): boolean {
  return row.rest !== undefined && !filter.hidden.has('rest')
}

/** The extra height per head that makes the block as high as the MLP's. */
function extraHeight(
  block: Block<HeadRow>,
  shown: readonly HeadRow[],
  filter: Filter,
  wanted: number,
): number {
  const lines = shown.reduce(
    (sum, row) => sum + linesOf(row, filter) * ROW + FRAME + GAP + outputHeight(row, filter),
    0,
  )
  const needed = lines + (block.rest ? ROW : 0) - GAP
  return shown.length > 0 ? Math.max(0, Math.min(44, (wanted - needed) / shown.length)) : 0
}

function placeHead(
  detail: Detail,
  row: HeadRow,
  graph: FlowGraph,
  filter: Filter,
  columns: Columns,
  y: number,
  height: number,
): void {
  const lines = linesOf(row, filter)
  const middle = y + height / 2
  const top = middle - (lines * ROW) / 2
  placeQuery(detail, row, columns, y, height)
  row.sources.forEach((source, i) => {
    const line = top + i * ROW
    const label = graph.prompt[source.position]?.label ?? ''
    detail.text(columns.source + 14, line + ROW / 2, `${source.position}`, 'number', 'end')
    detail.text(
      columns.source + 19,
      line + ROW / 2,
      label,
      'source',
      'start',
      columns.sourceWidth - 22,
    )
    if (source.key) detail.chip(source.key, columns.key, line, columns.chip)
    placeWeight(detail, source.attention, columns, line)
    detail.chip(source.value, columns.value, line, columns.chip)
    into(detail, source.value, source.share ?? 0, columns, line, middle)
  })
  const line = top + row.sources.length * ROW
  placeToggle(detail, row, filter, columns, line)
  if (row.rest && hasRest(row, filter)) {
    detail.rest(row.rest.node, 'others', columns.value, line, columns.chip)
    into(detail, row.rest.node, row.rest.edge.share ?? 0, columns, line, middle)
  }
  detail.chip(row.node, columns.output, middle - ROW / 2, columns.chip)
  const name = row.node.annotation?.name ?? ''
  if (name !== '')
    detail.text(
      columns.output,
      middle - ROW + 4,
      name,
      'strong',
      'start',
      columns.share - columns.output,
    )
}

/** The head's name, its query and, if there is room, its attention over the prompt. */
function placeQuery(detail: Detail, row: HeadRow, columns: Columns, y: number, height: number) {
  const room = height - 2 * ROW - FRAME
  const top = y + FRAME / 2
  detail.text(columns.query, top + ROW / 2, `head ${row.head}`, 'strong')
  if (row.query) detail.chip(row.query, columns.query, top + ROW, columns.chip)
  if (room < 12) return
  const base = top + 2 * ROW + Math.min(room, 44) - 2
  const step = columns.chip / (row.node.position + 1)
  detail.bar('track', columns.query, base, columns.chip, 1)
  for (const source of row.sources) {
    const tall = Math.max(1, finite(source.attention) * (Math.min(room, 44) - 6))
    const x = columns.query + source.position * step
    detail.bar('strip', x, base - tall, Math.max(1.5, step - 1), tall)
  }
}

/** An attention probability as a number above its bar. */
function placeWeight(detail: Detail, attention: number, columns: Columns, y: number): void {
  const { weight: x, weightWidth } = columns
  const width = weightWidth - 6
  detail.bar('track', x, y + ROW - 6, width, 3)
  detail.bar('attention', x, y + ROW - 6, width * Math.min(1, finite(attention)), 3)
  detail.text(x + width / 2, y + 9, decimals(attention, 2), 'number', 'middle')
}

/** The ribbon from a value to its head's output; its thickness is the share. */
function into(
  detail: Detail,
  node: HeadRow['node'],
  share: number,
  columns: Columns,
  line: number,
  middle: number,
): void {
  const thickness = Math.max(1, Math.min(1, Math.abs(finite(share))) * (CHIP - 5))
  detail.ribbons.push({
    node,
    share,
    x0: columns.value + columns.chip,
    y0: line + (ROW - thickness) / 2,
    h0: thickness,
    x1: columns.output,
    y1: middle - thickness / 2,
    h1: thickness,
  })
}

// A head's rows of W_O: a decomposition of attention's output by coordinate instead of by source.
// They are expanded on demand; their shares are of attention's output.

const MARGIN = 6
const ROW_NAME = 150 // px

/** The head's name in the URL: `layer.head`. */
export function headName(row: HeadRow): string {
  return `${row.node.layer}.${row.head}`
}

/** Height of a head's W_O rows; 0 if they are collapsed. */
export function outputHeight(row: HeadRow, filter: Filter): number {
  if (!filter.opened.has(headName(row)) || row.outputRows.length === 0) return 0
  return (row.outputRows.length + 1) * ROW + MARGIN
}

export function placeToggle(
  detail: Detail,
  row: HeadRow,
  filter: Filter,
  columns: Columns,
  y: number,
): void {
  const count = row.outputRows.length
  if (count === 0) return
  const open = filter.opened.has(headName(row))
  const text = `${open ? '▾' : '▸'} ${count} ${count === 1 ? 'row' : 'rows'} of W_O`
  const box = { x: columns.source, y: y + 2, width: 108, height: ROW - 4 }
  detail.toggles.push({ ...box, head: headName(row), open, text })
}

export function placeOutputRows(
  detail: Detail,
  row: HeadRow,
  block: Block<HeadRow>,
  columns: Columns,
  top: number,
): void {
  const all = block.rows.flatMap((head) => head.outputRows)
  const largest = Math.max(...all.map(({ node }) => Math.abs(finite(node.activation))), 1e-9)
  detail.text(columns.weight - 12, top + ROW / 2, 'row of W_O', 'column', 'end')
  const middleOfWeight = columns.weight + columns.weightWidth / 2 - 3
  detail.text(middleOfWeight, top + ROW / 2, 'activation', 'column', 'middle')
  detail.text(columns.value, top + ROW / 2, 'tokens', 'column')
  detail.text(columns.output, top + ROW / 2, 'share', 'column')
  row.outputRows.forEach(({ node, share }, i) => {
    const y = top + (i + 1) * ROW
    const middle = y + ROW / 2
    const activation = finite(node.activation)
    detail.text(columns.weight - 12, middle, neuronName(node), 'number', 'end', ROW_NAME)
    signedBar(detail, activation / largest, columns.weight, y, columns.weightWidth - 6)
    detail.chip(node, columns.value, y, columns.chip, activation < 0)
    if (share !== undefined) detail.text(columns.output, middle, percent(share), 'number')
  })
}

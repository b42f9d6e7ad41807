import { finite } from '../contract'
import type { FlowGraph, GraphNode } from '../model/flow_graph'
import { percent } from '../presentation/wording'
import { placeAttention } from './attention_layout'
import { type Filter, passing } from './controls'
import type { Block, LayerModel, NeuronRow } from './layer_model'
import {
  CHIP,
  Detail,
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

// The layout of a layer: the rail on top, attention on the left, the MLP on the right or, in a
// narrow window, below.

const RAIL = 68
const GAP = 16
const WIDE = 900 // px; minimum for two blocks side by side

export function detailLayout(
  model: LayerModel,
  graph: FlowGraph,
  filter: Filter,
  width: number,
): Detail {
  const detail = new Detail(width)
  const mixing = filter.hidden.has('attention') ? undefined : model.attention
  const neurons = filter.hidden.has('mlp') ? undefined : model.mlp
  const beside = mixing !== undefined && neurons !== undefined && width >= WIDE
  const gated = neurons?.rows.some((row) => row.up) // has a third column of chips
  const left = beside ? Math.round((width - GAP) * (gated ? 0.55 : 0.6)) : width
  const bar = beside ? mlpHeight(neurons, filter) : 0
  const attention =
    mixing && placeAttention(detail, mixing, graph, filter, { x: 0, y: RAIL, width: left, bar })
  const y = beside || !attention ? RAIL : attention.bottom + GAP
  const place = { x: beside ? left + GAP : 0, y, width: beside ? width - GAP - left : width, bar }
  const mlp = neurons && placeMlp(detail, neurons, graph, filter, place)
  placeRail(detail, model, attention?.joint, beside || !attention ? mlp?.joint : undefined)
  const bottom = Math.max(RAIL, attention?.bottom ?? 0, mlp?.bottom ?? 0)
  if (beside) for (const panel of detail.panels) panel.height = bottom - panel.y
  detail.height = bottom + 2
  return detail
}

const WIDTH = 104 // px, of a stop's chip

interface Stop {
  node: GraphNode
  x: number
  label: string
  /** The previous residual's share in this one. */
  kept: number | undefined
}

/** The residual stream above the blocks, and the share that each block adds. */
export function placeRail(
  detail: Detail,
  model: LayerModel,
  attention: Placed['joint'],
  mlp: Placed['joint'],
): void {
  const stops = stopsOf(detail.width, model, attention)
  stops.forEach((stop, i) => {
    placeStop(detail, stop, i === 0, i === stops.length - 1)
    const previous = stops[i - 1]
    if (!previous) return
    const label = stop.kept === undefined ? '' : `${percent(stop.kept)} from before`
    const segment = {
      node: previous.node,
      x0: previous.x + WIDTH,
      x1: stop.x,
      share: stop.kept,
      label,
    }
    detail.rail.segments.push(segment)
  })
  const mid = stops.find(({ node }) => node === model.mid)
  join(detail, attention, model.attention?.outputShare, mid && mid.x + WIDTH / 2)
  join(detail, mlp, model.mlp?.outputShare)
}

function stopsOf(width: number, model: LayerModel, attention: Placed['joint']): Stop[] {
  const end = width - WIDTH
  const stops: Stop[] = []
  if (model.before) stops.push({ node: model.before, x: 0, label: 'before', kept: undefined })
  if (model.mid) {
    const under = attention ? attention.x - WIDTH / 2 : end
    const x = under < end - WIDTH - 40 ? under : (end - WIDTH) / 2
    const mixed = model.attention?.output?.kind === 'MIXER_OUTPUT'
    const label = mixed ? 'after the mixer' : 'after attention'
    stops.push({ node: model.mid, x, label, kept: model.keptByMid })
  }
  if (model.after) {
    const label = model.mid ? 'after the MLP' : 'after the block'
    stops.push({ node: model.after, x: end, label, kept: model.keptByAfter })
  }
  return stops
}

function placeStop(detail: Detail, stop: Stop, first: boolean, last: boolean): void {
  const { y } = detail.rail
  detail.chip(stop.node, stop.x, y, WIDTH)
  const [x, anchor] = first
    ? ([stop.x, 'start'] as const)
    : last
      ? ([stop.x + WIDTH, 'end'] as const)
      : ([stop.x + WIDTH / 2, 'middle'] as const)
  detail.text(x, y - 7, stop.label, 'column', anchor)
}

/** A line from an output up to the rail: to its stop, or straight up if there is none. */
function join(
  detail: Detail,
  joint: Placed['joint'],
  share: number | undefined,
  stop?: number | undefined,
): void {
  if (!joint) return
  const label = share === undefined ? '' : `${share < 0 ? '' : '+'}${percent(share)}`
  const y1 = detail.rail.y + (ROW + CHIP) / 2
  const to = stop ?? joint.x
  detail.rail.joints.push({ node: joint.node, x: joint.x, to, y0: joint.y, y1, share, label })
}

// The MLP's block: each neuron's key, activation and value.

interface Columns {
  chip: number
  name: number
  key: number
  up: number
  activation: number
  activationWidth: number
  value: number
  share: number
  /** Largest |activation|, which has a full bar. */
  largest: number
}

const NAME = 44
const LONGEST_NAME = 0.26 // of the block's width
const NUMBER = 6.4 // px of a character
const SPACES = { activation: 66, share: 56, ribbons: 56 }
const NARROW_SPACES = { activation: 56, share: 46, ribbons: 28 } // leave room for tokens
const NARROW = 460 // px

export function placeMlp(
  detail: Detail,
  block: Block<NeuronRow>,
  graph: FlowGraph,
  filter: Filter,
  at: Place,
): Placed {
  const gated = block.rows.some((row) => row.up)
  const columns = columnsIn(at, block.rows, gated)
  const { shown, hidden, kept } = passing(block.rows, filter)
  // For a mixture of experts, dMlp is the size of one expert, not of all selected experts.
  const all = block.rows.some((row) => row.node.expert !== undefined) ? undefined : graph.sizes.dMlp
  const text = summary(block, block.rows.length, all, 'neurons')
  heading(
    detail,
    at,
    'MLP',
    block,
    [...text, ...shownShare(kept)],
    isWhole(block)
      ? []
      : [
          [columns.name, 'neuron'],
          [columns.key, gated ? 'gate' : 'key'],
          ...(gated ? [[columns.up, 'up'] as const] : []),
          [columns.value - 6, 'activation', 'end'],
          [columns.value, 'value'],
        ],
  )
  const rows: Stacked[] = []
  let y = at.y + HEAD
  for (const row of shown) {
    placeNeuron(detail, row, columns, y)
    rows.push({ row, y })
    y += ROW
  }
  const ends = { x: columns.value, width: columns.chip, share: columns.share }
  const rest = restLabel(all, block.rows.length)
  y = placeRemainder(detail, rows, block, filter, ends, y, rest)
  return placeSum(
    detail,
    at,
    block,
    rows,
    ends,
    placeHiddenRows(detail, hidden, 'neurons', ends, y),
  )
}

/** Height of the block's rows; attention's block is stretched to it. */
export function mlpHeight({ rest, bias, rows }: Block<NeuronRow>, filter: Filter): number {
  const { shown, hidden } = passing(rows, filter)
  const lines =
    shown.length +
    (rest && !filter.hidden.has('rest') ? 1 : 0) +
    (bias && !filter.hidden.has('bias') ? 1 : 0) +
    (hidden > 0 ? 1 : 0)
  return lines * ROW
}

function columnsIn(at: Place, rows: readonly NeuronRow[], gated: boolean): Columns {
  const chips = gated ? 3 : 2
  const longest = Math.max(0, ...rows.map(({ node }) => neuronName(node).length))
  const names = Math.max(NAME, Math.min(LONGEST_NAME * at.width, longest * NUMBER + 10))
  const spaces = at.width < NARROW ? NARROW_SPACES : SPACES
  const taken = names + spaces.activation + spaces.share + spaces.ribbons + 4
  const chip = (at.width - 2 * PAD - taken) / chips
  const name = at.x + PAD
  const key = name + names
  const up = key + chip + 4
  const activation = gated ? up + chip : key + chip
  const value = activation + spaces.activation
  const share = value + chip + spaces.share
  const largest = Math.max(...rows.map((row) => Math.abs(finite(row.node.activation))), 1e-9)
  const activationWidth = spaces.activation
  return { chip, name, key, up, activation, activationWidth, value, share, largest }
}

function placeNeuron(detail: Detail, row: NeuronRow, at: Columns, y: number): void {
  const { node } = row
  detail.text(at.key - 8, y + ROW / 2, neuronName(node), 'number', 'end', at.key - at.name)
  if (row.key) detail.chip(row.key, at.key, y, at.chip)
  if (row.up) detail.chip(row.up, at.up, y, at.chip)
  const activation = finite(node.activation)
  signedBar(detail, activation / at.largest, at.activation + 5, y, at.activationWidth - 10)
  detail.chip(node, at.value, y, at.chip, activation < 0)
}

// The MLP's block: for each neuron what it responds to, how much, and what it writes.
import type { FlowGraph } from '../../graph/graph'
import { type Filter, passing } from '../filter'
import type { LayerModel, NeuronRow } from './model'
import { type Detail, HEAD, PAD, type Place, type Placed, ROW, scaled } from './placing'
import {
  finish,
  heading,
  hiddenRows,
  remainder,
  restWords,
  type Stacked,
  shownShare,
  summary,
} from './sums'

interface Columns {
  chip: number
  name: number
  key: number
  up: number
  activation: number
  value: number
  share: number
  /** Largest |activation|: what a full bar is. */
  largest: number
}

const NAME = 44
const ACTIVATION = 66
const SHARE = 50
const RIBBONS = 74

export function placeMlp(
  detail: Detail,
  model: LayerModel,
  graph: FlowGraph,
  filter: Filter,
  at: Place,
): Placed {
  const block = model.mlp
  const gated = block.rows.some((row) => row.up)
  const columns = columnsIn(at, block.rows, gated)
  const { shown, hidden, kept } = passing(block.rows, filter)
  // Of a mixture the sizes tell one expert's neurons, not those of all that were asked.
  const all = block.rows.some((row) => row.node.expert !== undefined) ? undefined : graph.sizes.dMlp
  const words = summary(block, block.rows.length, all, 'neurons')
  heading(
    detail,
    at,
    'MLP',
    block,
    [...words, ...shownShare(kept)],
    [
      [columns.name, 'neuron'],
      [columns.key, gated ? 'its gate' : 'its key'],
      ...(gated ? [[columns.up, 'its up'] as const] : []),
      [columns.activation + ACTIVATION / 2, 'activation', 'middle'],
      [columns.value, 'its value'],
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
  const rest = restWords(all, block.rows.length)
  y = remainder(detail, rows, block, filter, ends, y, rest)
  return finish(detail, at, block, rows, ends, hiddenRows(detail, hidden, 'neurons', ends, y))
}

/** Height of the block's rows, by which attention's heads are spread. */
export function mlpHeight(model: LayerModel, filter: Filter): number {
  if (filter.hidden.has('mlp')) return 0
  const { rest, bias, rows } = model.mlp
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
  const chip = (at.width - 2 * PAD - NAME - ACTIVATION - SHARE - RIBBONS - 4) / chips
  const name = at.x + PAD
  const key = name + NAME
  const up = key + chip + 4
  const activation = gated ? up + chip : key + chip
  const value = activation + ACTIVATION
  const share = value + chip + SHARE
  const largest = Math.max(...rows.map((row) => Math.abs(row.node.activation ?? 0)), 1e-9)
  return { chip, name, key, up, activation, value, share, largest }
}

function placeNeuron(detail: Detail, row: NeuronRow, at: Columns, y: number): void {
  const { node } = row
  const name = node.expert === undefined ? `${node.neuron}` : `e${node.expert} ${node.neuron}`
  detail.text(at.key - 8, y + ROW / 2, name, 'number', 'end')
  if (row.key) detail.chip(row.key, at.key, y, at.chip)
  if (row.up) detail.chip(row.up, at.up, y, at.chip)
  const activation = node.activation ?? 0
  scaled(detail, activation / at.largest, at.activation + 5, y, ACTIVATION - 10)
  detail.chip(node, at.value, y, at.chip, activation < 0)
}

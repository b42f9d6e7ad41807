import { finite } from '../contract'
import type { FlowGraph, GraphNode } from '../model/flow_graph'
import type { ContributionTree } from '../model/graph_queries'
import { CHARACTER, charactersIn } from '../presentation/svg'
import { at, shortName } from '../presentation/wording'
import { type Ribbon, ROW } from './layer_pieces'

// The layout of the why figure: source tokens, the parts that add most to the target's logit, and
// the answer. The parts and the two kinds of rest add up to the logit.

/** A part of the logit, or the rest of a sublayer or of the whole. */
export interface PartRow {
  node: GraphNode
  name: string
  contribution: number
  rest: boolean
  y: number
  ribbon: Ribbon
}

/** A token that heads read; undefined = all tokens without a box. */
export interface SourceBox {
  position: number | undefined
  text: string
  y: number
}

export interface WhyLayout {
  width: number
  height: number
  sources: SourceBox[]
  sourceRibbons: Ribbon[]
  rows: PartRow[]
  columns: WhyColumns
  /** Top and bottom of the stacked contributions at the answer. */
  stack: { y: number; height: number }
}

/** Left edges of the columns, and their widths; the source tokens begin at 0. */
export interface WhyColumns {
  sourceWidth: number
  name: number
  chip: number
  /** 0 if the window is too narrow for the parts' top tokens. */
  chipWidth: number
  /** Right edge of the numbers, where the ribbons to the answer start. */
  number: number
  stack: number
  answer: number
  answerWidth: number
}

export const TOP = 26
const BOTTOM = 8
const THICKEST = ROW - 4 // px
const LEAST_SOURCE = 0.1 // of the largest part; smaller sources of a head have no box
const NARROWEST = 350 // px
const WITH_TOKENS = 480 // px; narrower figures may leave out the parts' top tokens
const WIDEST = 900
const OTHERS = 'other tokens'
const LEAST_CHIP = 56 // px
const LEAST_RIBBON = 48 // px between a number and the stack

/** The height of a logit in pixels at which the parts of a tree fit in their rows. */
export function whyScale(tree: ContributionTree): number {
  const sizes = partsOf(tree).map((part) => Math.abs(finite(part.contribution)))
  const total = sizes.reduce((sum, size) => sum + size, 0)
  return Math.min(THICKEST / (Math.max(...sizes) || 1), (sizes.length * ROW) / (total || 1))
}

export function whyLayout(
  graph: FlowGraph,
  tree: ContributionTree,
  width: number,
  scale = whyScale(tree),
): WhyLayout {
  const parts = partsOf(tree)
  const total = parts.reduce((sum, part) => sum + Math.abs(finite(part.contribution)), 0)
  const largest = Math.max(...parts.map((part) => Math.abs(finite(part.contribution))))
  const inputs = parts.map((part) => inputsOf(graph, part, LEAST_SOURCE * largest))
  const named = parts.filter(({ rest }) => !rest)
  const columns = columnsIn(
    Math.min(WIDEST, Math.max(NARROWEST, width)),
    inputs.flat().length > 0,
    Math.max(0, ...named.map(({ name }) => name.length)) * CHARACTER,
  )
  const room = parts.length * ROW
  const stack = { y: TOP + (room - total * scale) / 2, height: total * scale }
  let end = stack.y
  const rows = parts.map((part, i) => {
    const height = Math.abs(finite(part.contribution)) * scale
    const y = TOP + i * ROW
    const start = y + (ROW - height) / 2
    const ribbon = ribbonOf(part.node, part.contribution, height, {
      x0: columns.number + 8,
      y0: start,
      x1: columns.stack,
      y1: end,
    })
    end += height
    return { ...part, y, ribbon }
  })
  const length = charactersIn(columns.sourceWidth - 8)
  const sources = sourceBoxes(graph, inputs.flat(), room, length)
  return {
    width: columns.answer + columns.answerWidth,
    height: Math.max(TOP + room, (sources.at(-1)?.y ?? 0) + ROW) + BOTTOM,
    sources,
    sourceRibbons: sourceRibbons(rows, inputs, sources, columns, scale),
    rows,
    columns,
    stack,
  }
}

/** The columns; `longest` is the width of the longest name of a part, which has room first. */
function columnsIn(width: number, hasSources: boolean, longest: number): WhyColumns {
  const free = Math.max(0, width - WITH_TOKENS)
  const narrow = width < WITH_TOKENS
  const sourceWidth = (narrow ? 70 : 90) + free * 0.1
  const name = hasSources ? sourceWidth + (narrow ? 22 : 30) + free * 0.16 : 0
  const names = (narrow ? 112 : 102) + free * 0.12
  const answerWidth = 66 + free * 0.12
  const answer = width - answerWidth
  const missing = longest === 0 ? 0 : Math.max(0, longest + 12 - names)
  const room = answer - 12 - LEAST_RIBBON - (name + names + 46)
  let chipWidth = narrow ? (room < LEAST_CHIP ? 0 : Math.min(70, room)) : 70 + free * 0.1
  let spare = room - chipWidth
  if (missing > spare) {
    spare += chipWidth
    chipWidth = 0
  }
  const chip = name + names + Math.min(missing, Math.max(0, spare))
  return {
    sourceWidth,
    name,
    chip,
    chipWidth,
    number: chip + chipWidth + 46,
    stack: answer - 12,
    answer,
    answerWidth,
  }
}

type Unplaced = Omit<PartRow, 'y' | 'ribbon'>

/** The disjoint parts of a tree, largest contribution first, and the rest of the whole at the end. */
export function partsOf(tree: ContributionTree): Unplaced[] {
  const parts = tree.parts.flatMap((part) => (isSublayer(part) ? divided(part) : [whole(part)]))
  parts.sort((a, b) => b.contribution - a.contribution)
  return [...parts, restOf(tree, 'all the rest')].filter((part) => isShown(part.contribution))
}

/** Whether a contribution is not written as 0.00. */
function isShown(contribution: number): boolean {
  return !(Math.abs(contribution) < 0.005)
}

function isSublayer({ node, parts }: ContributionTree): boolean {
  return parts.length > 0 && node.kind !== 'HEAD_OUTPUT'
}

function divided(sublayer: ContributionTree): Unplaced[] {
  return [...sublayer.parts.map(whole), restOf(sublayer, `rest of ${shortName(sublayer.node)}`)]
}

function whole({ node, contribution }: ContributionTree): Unplaced {
  return { node, name: shortName(node), contribution, rest: false }
}

function restOf({ node, rest }: ContributionTree, name: string): Unplaced {
  return { node, name, contribution: rest, rest: true }
}

interface Input {
  node: GraphNode
  /** Undefined for all tokens that have no box. */
  position: number | undefined
  value: number
}

/** The contributions of a part by the token that they are read from; they add up to the part's. */
function inputsOf(graph: FlowGraph, { node, contribution }: Unplaced, least: number): Input[] {
  if (node.kind === 'BLOCK_INPUT') return [{ node, position: node.position, value: contribution }]
  if (node.kind !== 'HEAD_OUTPUT') return []
  const read = graph
    .partsOf(node.id)
    .map(({ node: part, edge }) => ({
      node: part,
      position: part.source,
      value: finite(edge.logitContribution),
    }))
    .filter(({ position, value }) => position !== undefined && Math.abs(value) >= least)
  const value = read.reduce((rest, source) => rest - source.value, contribution)
  return isShown(value) ? [...read, { node, position: undefined, value }] : read
}

/**
 * One box per source token in the order of the prompt; the one for all others is last. Texts have at
 * most `length` characters.
 */
function sourceBoxes(
  graph: FlowGraph,
  inputs: readonly Input[],
  room: number,
  length: number,
): SourceBox[] {
  const positions = [...new Set(inputs.map(({ position }) => position))]
  const order = (position: number | undefined) => position ?? Number.POSITIVE_INFINITY
  positions.sort((a, b) => order(a) - order(b))
  const pitch = Math.max(ROW, Math.min(1.6 * ROW, room / Math.max(1, positions.length)))
  const first = TOP + Math.max(0, (room - pitch * positions.length) / 2)
  return positions.map((position, i) => ({
    position,
    text: position === undefined ? othersIn(length) : at(position, graph.prompt, length),
    y: first + i * pitch,
  }))
}

function othersIn(length: number): string {
  return length < OTHERS.length - 1 ? 'others' : OTHERS // its font is narrower than that of tokens
}

/** The ribbons from the source tokens to the parts, stacked at both ends. */
function sourceRibbons(
  rows: readonly PartRow[],
  inputs: readonly (readonly Input[])[],
  boxes: readonly SourceBox[],
  columns: WhyColumns,
  scale: number,
): Ribbon[] {
  const height = (value: number) => Math.abs(finite(value)) * scale
  const starts = new Map(boxes.map((box) => [box.position, box.y + 3]))
  return rows.flatMap((row, i) => {
    const read = inputs[i] ?? []
    let end = row.y + (ROW - read.reduce((sum, { value }) => sum + height(value), 0)) / 2
    return read.map(({ node, position, value }) => {
      const start = starts.get(position) ?? 0
      const edges = { x0: columns.sourceWidth, y0: start, x1: columns.name - 6, y1: end }
      starts.set(position, start + height(value))
      end += height(value)
      return ribbonOf(node, value, height(value), edges)
    })
  })
}

function ribbonOf(
  node: GraphNode,
  value: number,
  height: number,
  edges: Pick<Ribbon, 'x0' | 'y0' | 'x1' | 'y1'>,
): Ribbon {
  return { node, share: value, ...edges, h0: height, h1: height }
}

import { finite } from '../contract'
import type { FlowGraph, GraphNode } from '../model/flow_graph'
import type { ContributionTree } from '../model/graph_queries'
import { partOf } from './inspector'

// The parts of two traces whose contributions differ most.

/** A part in two traces. */
export interface Difference {
  /** The part in the first trace; undefined for all other parts. */
  node: GraphNode | undefined
  /** What it adds to the target's logit. */
  before: number
  after: number
}

export interface Side {
  graph: FlowGraph
  position: number
  tree: ContributionTree | undefined
}

export interface Ids {
  toAfter: (id: string) => string
  toBefore: (id: string) => string
}

const POSITION = /(?<![^/])([ps])(\d+)(?![^/])/g

/** Translates ids between the traces, whose prompts can have different positions. */
export function otherIds(positions: Readonly<Record<string, number>> | undefined): Ids {
  if (!positions) return { toAfter: String, toBefore: String }
  const back = Object.fromEntries(
    Object.entries(positions).map(([before, after]) => [String(after), Number(before)]),
  )
  const translate = (to: Readonly<Record<string, number>>) => (id: string) =>
    id.replace(POSITION, (_, letter: string, number: string) => `${letter}${to[number] ?? '?'}`)
  return { toAfter: translate(positions), toBefore: translate(back) }
}

const SHOWN = 12

/**
 * The heads, MLPs and embeddings whose contributions differ most, and all other parts at the end, so
 * that the rows add up to the logits. Empty without contributions, or if the models have different
 * parts.
 */
export function differences(before: Side, after: Side, ids: Ids): Difference[] {
  if (!before.tree || !after.tree || differentParts(before.graph, after.graph)) return []
  const rows: Difference[] = partsAt(before).flatMap((node) => {
    const [first, second] = [
      contributionOf(before.graph, node.id),
      contributionOf(after.graph, ids.toAfter(node.id)),
    ]
    if (first === undefined || second === undefined) return []
    return { node, before: first, after: second }
  })
  rows.sort((a, b) => changed(b) - changed(a))
  const shown = rows.slice(0, SHOWN)
  const left = (tree: ContributionTree, side: 'before' | 'after') =>
    shown.reduce((rest, row) => rest - row[side], tree.contribution)
  const others = { before: left(before.tree, 'before'), after: left(after.tree, 'after') }
  return [...shown, { node: undefined, ...others }]
}

/** Disjoint parts of the residual stream; attention without known heads is one part. */
function partsAt({ graph, position }: Side): GraphNode[] {
  const own = [...graph.nodes.values()].filter((node) => node.position === position)
  const divided = new Set(own.filter(({ kind }) => kind === 'HEAD_OUTPUT').map((n) => n.layer))
  return own.filter(
    ({ kind, layer }) =>
      PARTS.includes(kind) || (kind === 'ATTENTION_OUTPUT' && !divided.has(layer)),
  )
}

const PARTS = ['BLOCK_INPUT', 'HEAD_OUTPUT', 'MIXER_OUTPUT', 'MLP_OUTPUT']

/** Which models have different parts, in a sentence; undefined if both have the same parts. */
export function differentParts(first: FlowGraph, second: FlowGraph): string | undefined {
  const parts = ({ sizes, provenance }: FlowGraph) =>
    `${provenance.architecture} with ${sizes.nLayers} layers of ${sizes.nHeads} heads`
  const both = [first, second].map(parts)
  if (both[0] === both[1]) return undefined
  return `The models have different parts (${both.join(' and ')}); parts with the same name are not compared.`
}

function contributionOf(graph: FlowGraph, id: string): number | undefined {
  const node: GraphNode | undefined = graph.node(id)
  return node && partOf(node, graph)?.logitContribution
}

function changed({ before, after }: Difference): number {
  return Math.abs(finite(after - before))
}

import { finite } from '../contract'
import type { FlowGraph, GraphEdge, GraphNode } from './flow_graph'
import { matcher, type Token } from './tokens'

/** The step that a residual follows; a parallel block is a single step. */
export type AnswerStep = 'embedding' | 'attention' | 'MLP' | 'block'

/** The residual from which onwards the target is ranked first. */
export interface Answer {
  node: GraphNode
  layer: number | undefined
  /** The step that wrote this residual. */
  step: AnswerStep
}

/** The residuals of a position from the embedding upwards that have a reading. */
export function residuals(graph: FlowGraph, position: number): GraphNode[] {
  const found: (GraphNode | undefined)[] = [graph.node(`p${position}/BLOCK_INPUT`)]
  for (const layer of [...graph.layers].sort((a, b) => a - b)) {
    found.push(graph.at(layer, position, 'RESIDUAL_MID'))
    found.push(graph.at(layer, position, 'BLOCK_OUTPUT'))
  }
  return found.filter((node) => node?.reading !== undefined) as GraphNode[]
}

/** The first residual from which the target's rank stays 0; undefined if the last rank is not 0. */
export function answerAppears(graph: FlowGraph, position: number): Answer | undefined {
  const steps = residuals(graph, position)
  const lastBelow = steps.findLastIndex((node) => node.reading?.targetRank !== 0)
  const node = steps[lastBelow + 1]
  if (!node) return undefined
  return { node, layer: node.layer, step: stepTo(graph, node) }
}

function stepTo(graph: FlowGraph, node: GraphNode): AnswerStep {
  if (node.kind === 'BLOCK_INPUT') return 'embedding'
  if (node.kind === 'RESIDUAL_MID') return 'attention'
  return graph.at(node.layer ?? 0, node.position, 'RESIDUAL_MID') ? 'MLP' : 'block'
}

/** The node of one kind that adds most to the target's logit at a position. */
export function topContributor(
  graph: FlowGraph,
  position: number,
  kind: string,
): { node: GraphNode; logit: number } | undefined {
  let best: { node: GraphNode; logit: number } | undefined
  for (const node of graph.nodes.values()) {
    if (node.kind !== kind || node.position !== position) continue
    for (const edge of graph.edgesFrom(node.id)) {
      const logit = edge.logitContribution
      if (logit !== undefined && (!best || finite(logit) > finite(best.logit))) {
        best = { node, logit }
      }
    }
  }
  return best
}

/** The source position that a head attends to most; the remainder of its sources has none. */
export function mostAttended(
  graph: FlowGraph,
  head: GraphNode,
): { position: number; attention: number } | undefined {
  let most: { position: number; attention: number } | undefined
  for (const { node, edge } of graph.partsOf(head.id)) {
    const attention = edge.attention ?? 0
    if (node.source === undefined) continue
    if (!most || finite(attention) > finite(most.attention)) {
      most = { position: node.source, attention }
    }
  }
  return most
}

// Paths: the strongest source, the strongest destination, the strongest path to the target.

/** The source that contributes most to a node. */
export function strongestSource(graph: FlowGraph, id: string): GraphNode | undefined {
  return stepBack(graph, id)?.node
}

export function strongestDestination(graph: FlowGraph, id: string): GraphNode | undefined {
  const edges = graph.edgesFrom(id).filter((edge) => graph.node(edge.target))
  const part = edges.find((edge) => edge.kind === 'PART') ?? edges[0]
  return part && graph.node(part.target)
}

/** One step of a path, and its edge into the previous step. */
export interface Step {
  node: GraphNode
  edge: GraphEdge | undefined
}

const ENDS = ['PREDICTION', 'FINAL_NORM', 'BLOCK_OUTPUT']
// A path does not continue through a remainder or a constant.
const DEAD_ENDS = new Set(['OTHER', 'ATTENTION_BIAS', 'MLP_BIAS'])

/**
 * The strongest path from a position's prediction back to the embedding, as
 * `trace.path_to_target()` returns it. At a sum the path takes the part that adds most to the
 * target's logit (the largest share, if contributions are missing), at attention's output the
 * concatenated heads, elsewhere the edge of largest weight.
 */
export function pathToTarget(graph: FlowGraph, position: number): Step[] {
  const start = lastOutput(graph, position)
  if (!start) return []
  const path: Step[] = [{ node: start, edge: undefined }]
  for (let step = stepBack(graph, start.id); step; step = stepBack(graph, step.node.id)) {
    path.push(step)
  }
  return path
}

function lastOutput(graph: FlowGraph, position: number): GraphNode | undefined {
  for (const kind of ENDS) {
    let last: GraphNode | undefined
    for (const node of graph.nodes.values()) {
      if (node.kind === kind && node.position === position) last = node
    }
    if (last) return last
  }
  return undefined
}

function stepBack(graph: FlowGraph, id: string): Step | undefined {
  const node = graph.node(id)
  if (node?.kind === 'ATTENTION_SUM' || node?.kind === 'ATTENTION_OUTPUT') {
    const heads = graph.at(node.layer ?? 0, node.position, 'ATTENTION_CONCAT')
    if (heads) return { node: heads, edge: undefined }
  }
  const edges = graph.edgesInto(id).filter((edge) => {
    const source = graph.node(edge.source)
    return source && !DEAD_ENDS.has(source.kind)
  })
  const edge = strongest(edges)
  const source = edge && graph.node(edge.source)
  return source && { node: source, edge }
}

function strongest(edges: readonly GraphEdge[]): GraphEdge | undefined {
  const parts = edges.filter((edge) => edge.kind === 'PART')
  if (parts.length > 0 && parts.every((part) => part.logitContribution !== undefined)) {
    return best(parts, (part) => finite(part.logitContribution))
  }
  if (parts.length > 0) return best(parts, (part) => Math.abs(finite(part.share)))
  return best(edges, (edge) => Math.abs(finite(edge.weight)))
}

function best<Item>(items: readonly Item[], of: (item: Item) => number): Item | undefined {
  let found: Item | undefined
  for (const item of items) if (found === undefined || of(item) > of(found)) found = item
  return found
}

// The selection's share of the sums above it, and the shares of its own parts. A norm or a
// projection is not a sum, so the flow ends there.

/** The coloured fraction of each node's ribbon, 0 to 1, by node id. */
export type SelectionFlow = ReadonlyMap<string, number>

const LEAST = 0.004 // of a ribbon; anything smaller is invisible

/**
 * Above the selection, a ribbon is coloured by the selection's share of the node that the ribbon
 * leaves; below it, by the share that the ribbon's sum has in the selection. Both are products of
 * |share|, so the coloured width is the contribution itself.
 */
export function selectionFlow(graph: FlowGraph, selected: string): SelectionFlow {
  const flow = new Map<string, number>()
  const node = graph.node(selected)
  if (!node) return flow
  const part = written(graph, node)
  descend(graph, part, 1, flow)
  let fraction = 1
  for (let at: GraphNode | undefined = part; at && fraction > LEAST; ) {
    flow.set(at.id, fraction)
    const step = upward(graph, at)
    fraction *= step?.share ?? 0
    at = step?.node
  }
  return flow
}

interface Share {
  node: GraphNode
  /** |share|, at most 1. */
  share: number
}

/** The node that carries the effect of a key, a query or an up column: a value or a head's output. */
function written(graph: FlowGraph, node: GraphNode): GraphNode {
  const next = graph.edgesFrom(node.id).find((edge) => {
    if (edge.kind === 'RECALL') return true
    return edge.kind === 'ACTIVATE' && node.kind !== 'MLP_INPUT' && node.kind !== 'ATTENTION_CONCAT'
  })
  if (node.kind === 'HEAD_QUERY') {
    return graph.node(node.id.replace('HEAD_QUERY', 'HEAD_OUTPUT')) ?? node
  }
  return (next && graph.node(next.target)) ?? node
}

/** The sum that a node is a part of; there is one at most. */
function upward(graph: FlowGraph, node: GraphNode): Share | undefined {
  const at = (kind: string) => graph.at(node.layer ?? 0, node.position, kind)
  if (node.kind === 'ATTENTION_CONCAT') {
    const result = at('ATTENTION_SUM') ?? at('ATTENTION_OUTPUT')
    return result && { node: result, share: headsShare(graph, result) }
  }
  const edge = graph.edgesFrom(node.id).find(({ kind }) => kind === 'PART' || isSame(node, kind))
  const sum = edge && graph.node(edge.target)
  return sum && { node: sum, share: edge.kind === 'PART' ? size(edge.share) : 1 }
}

/** Whether an edge turns a sublayer's raw output into its final form. */
function isSame(node: GraphNode, kind: string): boolean {
  return node.kind.endsWith('_SUM') && (kind === 'NORM' || kind === 'SCALE')
}

function descend(graph: FlowGraph, sum: GraphNode, weight: number, flow: Map<string, number>) {
  if (weight < LEAST) return
  for (const { node, share } of downward(graph, sum)) {
    flow.set(node.id, weight)
    descend(graph, node, weight * share, flow)
  }
}

/** The parts of a node; the concatenated heads count as one part of attention's output. */
function downward(graph: FlowGraph, sum: GraphNode): Share[] {
  const parts = graph.partsOf(sum.id).map(({ node, edge }) => ({ node, share: size(edge.share) }))
  const concat = graph.at(sum.layer ?? 0, sum.position, 'ATTENTION_CONCAT')
  const written = parts.some(({ node }) => node.kind === 'ATTENTION_NEURON')
  if (concat && (written || sum.kind === 'ATTENTION_SUM')) {
    parts.push({ node: concat, share: headsShare(graph, sum) })
  }
  const before = parts.length === 0 ? formOf(graph, sum) : undefined
  return before ? [{ node: before, share: 1 }] : parts
}

/** The node from which this one follows by a norm, a scale or the unembedding. */
function formOf(graph: FlowGraph, node: GraphNode): GraphNode | undefined {
  if (node.kind === 'PREDICTION') return graph.sourceBy(node.id, 'PROJECT')
  if (node.kind !== 'FINAL_NORM' && !node.kind.endsWith('_OUTPUT')) return undefined
  return graph.sourceBy(node.id, 'NORM') ?? graph.sourceBy(node.id, 'SCALE')
}

/** The heads' share of attention's output: everything except the bias. */
function headsShare(graph: FlowGraph, result: GraphNode): number {
  const bias = graph.partsOf(result.id).find(({ node }) => node.kind === 'ATTENTION_BIAS')
  return size(1 - (bias?.edge.share ?? 0))
}

function size(share: number | undefined): number {
  return Math.min(1, Math.abs(finite(share)))
}

// Search: nodes that have a matching token among their top or bottom tokens.

export interface Found {
  node: GraphNode
  token: Token
  end: 'top' | 'bottom'
  /** Index in the list of that end; 0 is the most extreme. */
  place: number
}

/** All matching nodes, each with its first match. */
export function search(graph: FlowGraph, query: string): Found[] {
  const wanted = matcher(query)
  if (!wanted) return []
  const found: Found[] = []
  for (const node of graph.nodes.values()) {
    const hit = placeIn(node, wanted)
    if (hit) found.push(hit)
  }
  return found
}

function placeIn(node: GraphNode, wanted: (token: Token) => boolean): Found | undefined {
  for (const end of ['top', 'bottom'] as const) {
    const list = node.reading?.[end] ?? []
    const place = list.findIndex(({ token }) => wanted(token))
    const token = list[place]?.token
    if (token) return { node, token, end, place }
  }
  return undefined
}

import { finite } from '../contract'
import type { FlowGraph, GraphEdge, GraphNode, Part } from './flow_graph'
import { matcher, type Token } from './tokens'

/** The residual stream after one addition to it. */
export interface ResidualStep {
  /** What was added, or `input` for a residual that no traced block made. */
  name: string
  /** Where that is, for a sentence: `the embedding`, `layer 3’s attention`. */
  place: string
  node: GraphNode
}

/**
 * The residual steps of all layers at one position, upwards. A parallel block, and a trace without
 * the residual between attention and MLP, has one step for both. The input of a layer is a step of
 * its own only if the layer below was not traced. A step of which the graph has all parts, or of a
 * layer without all parts, is named after the sublayers that are shown; without any, `block`.
 */
export function residualSteps(graph: FlowGraph, position: number): ResidualStep[] {
  const steps: ResidualStep[] = []
  const input = graph.node(`p${position}/BLOCK_INPUT`)
  if (input) steps.push({ name: 'input', place: 'the embedding', node: input })
  for (const layer of [...graph.layers].sort((a, b) => a - b)) {
    const below = graph.layers.has(layer - 1)
      ? undefined
      : graph.at(layer - 1, position, 'BLOCK_OUTPUT')
    if (below) steps.push({ name: 'input', place: `layer ${layer - 1}`, node: below })
    const mid = graph.at(layer, position, 'RESIDUAL_MID')
    const output = graph.at(layer, position, 'BLOCK_OUTPUT')
    const add = (node: GraphNode, usual: string) => {
      const shown = addedTo(graph, node)
      const limited = graph.limited.some((level) => (level.layer ?? 0) === layer)
      const all = graph.partsOf(node.id).some((part) => BEFORE.has(part.node.kind))
      const mixer = shown.includes(MIXER)
      const named = limited || mixer || (all && shown.length > 0)
      const name = named ? shown.join(' and ') || 'block' : usual
      steps.push({ name: `+ ${name}`, place: `layer ${layer}’s ${name}`, node })
    }
    if (mid) add(mid, 'attention')
    if (output) add(output, mid ? 'MLP' : 'attention and MLP')
  }
  return steps
}

/** The names of the sublayers that are parts of a residual. */
function addedTo(graph: FlowGraph, residual: GraphNode): string[] {
  const kinds = new Set(graph.partsOf(residual.id).map(({ node }) => node.kind))
  return Object.entries(ADDED).flatMap(([kind, name]) => (kinds.has(kind) ? [name] : []))
}

// The residual before a block. A step that has it as a part has all its parts in the graph.
const BEFORE = new Set(['BLOCK_INPUT', 'BLOCK_OUTPUT'])

const MIXER = 'mixer'

// What sublayers are called, in the order of the pass.
const ADDED: Record<string, string> = {
  ATTENTION_OUTPUT: 'attention',
  MIXER_OUTPUT: MIXER,
  MLP_OUTPUT: 'MLP',
}

/** A residual step at which the target has a rank. */
export interface RankedStep extends ResidualStep {
  rank: number
}

export function rankedSteps(graph: FlowGraph, position: number): RankedStep[] {
  return residualSteps(graph, position).flatMap((step) => {
    const rank = step.node.reading?.targetRank
    return rank === undefined ? [] : [{ ...step, rank }]
  })
}

/** The first step from which on the target's rank stays 0; undefined if the last rank is not 0. */
export function answerAppears(graph: FlowGraph, position: number): RankedStep | undefined {
  const steps = rankedSteps(graph, position)
  return steps[steps.findLastIndex(({ rank }) => rank !== 0) + 1]
}

/** The node of one kind that adds most to the target's logit at a position. */
export function topContributor(
  graph: FlowGraph,
  position: number,
  kind: string,
): { node: GraphNode; logit: number } | undefined {
  let best: { node: GraphNode; logit: number; share: number } | undefined
  for (const node of graph.nodes.values()) {
    if (node.kind !== kind || node.position !== position) continue
    const part = graph.edgesFrom(node.id).find((edge) => edge.kind === 'PART')
    const logit = part?.logitContribution
    if (logit === undefined || !Number.isFinite(logit)) continue
    const share = Math.abs(finite(part?.share))
    const more = best ? logit - best.logit : 1
    if (!best || more > 0 || (more === 0 && share > best.share)) best = { node, logit, share }
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
    const { attention } = edge
    if (node.source === undefined || attention === undefined || !Number.isFinite(attention))
      continue
    if (!most || attention > most.attention) {
      most = { position: node.source, attention }
    }
  }
  return most
}

// The strongest source and destination of a node, and the contribution tree of a target.

/** The source that contributes most to a node. */
export function strongestSource(graph: FlowGraph, id: string): GraphNode | undefined {
  return stepBack(graph, id)
}

export function strongestDestination(graph: FlowGraph, id: string): GraphNode | undefined {
  const edges = graph.edgesFrom(id).filter((edge) => graph.node(edge.target))
  const part = edges.find((edge) => edge.kind === 'PART') ?? edges[0]
  return part && graph.node(part.target)
}

/** A node of a contribution tree; `contribution` is the sum of those of `parts` and of `rest`. */
export interface ContributionTree {
  node: GraphNode
  contribution: number
  attention: number | undefined
  parts: ContributionTree[]
  rest: number
}

const RESIDUALS = new Set(['RESIDUAL_MID', 'BLOCK_OUTPUT'])
// The nodes whose parts are the parts of a sublayer's result.
const SUMS: Record<string, string[]> = {
  ATTENTION_OUTPUT: ['ATTENTION_SUM', 'ATTENTION_CONCAT'],
  MLP_OUTPUT: ['MLP_SUM'],
}
const LISTED = new Set([
  'HEAD_OUTPUT',
  'MIXER_HEAD',
  'ATTENTION_BIAS',
  'MEMORY_VALUE',
  'MLP_VALUE',
  'MLP_BIAS',
])

/**
 * The parts that add up to the logit of a position's target, as `trace.why()` returns them. The
 * largest contributions are listed, with the nodes that they are parts of. Undefined if the trace
 * has no contributions to the residual stream.
 */
export function contributionTree(
  graph: FlowGraph,
  position: number,
  atMost: number,
): ContributionTree | undefined {
  const top = Math.max(...graph.layers)
  const residual = graph.at(top, position, 'BLOCK_OUTPUT')
  if (!residual) return undefined
  const own = graph.partsOf(residual.id)
  if (own.length === 0 || own.some(({ edge }) => !contributes(edge))) return undefined
  const constant =
    top + 1 === graph.sizes.nLayers
      ? (graph.targets.get(position)?.constantLogitContribution ?? 0)
      : 0
  const logit = own.reduce((sum, { edge }) => sum + finite(edge.logitContribution), constant)
  const whole = treeOf(graph, residual, logit, undefined, summands(graph, residual.id))
  const listed = new Set([residual.id])
  const bySize = paths(whole).sort((a, b) => contributionSize(b) - contributionSize(a))
  for (const path of bySize) {
    const added = new Set([...listed, ...path.map(({ node }) => node.id)])
    if (added.size > atMost + 1) break
    for (const id of added) listed.add(id)
  }
  return onlyListed(whole, listed)
}

function contributionSize(path: readonly ContributionTree[]): number {
  return Math.abs(path.at(-1)?.contribution ?? 0)
}

/** The ways from the root to each node below it. */
function paths({ parts }: ContributionTree): ContributionTree[][] {
  return parts.flatMap((part) => [[part], ...paths(part).map((path) => [part, ...path])])
}

function treeOf(
  graph: FlowGraph,
  node: GraphNode,
  contribution: number,
  attention: number | undefined,
  of: readonly Part[],
): ContributionTree {
  const parts = of
    .filter(({ edge }) => contributes(edge))
    .map(({ node: part, edge }) => {
      const value = finite(edge.logitContribution)
      return treeOf(graph, part, value, edge.attention, listedParts(graph, part))
    })
  parts.sort((a, b) => b.contribution - a.contribution)
  return withRest({ node, contribution, attention, parts, rest: 0 })
}

function onlyListed(whole: ContributionTree, ids: ReadonlySet<string>): ContributionTree {
  const parts = whole.parts.filter(({ node }) => ids.has(node.id))
  return withRest({ ...whole, parts: parts.map((part) => onlyListed(part, ids)) })
}

function withRest(tree: ContributionTree): ContributionTree {
  const listed = tree.parts.reduce((sum, part) => sum + part.contribution, 0)
  return { ...tree, rest: tree.contribution - listed }
}

/** The parts of the residual stream; residuals with parts of their own are divided. */
function summands(graph: FlowGraph, id: string): Part[] {
  return graph.partsOf(id).flatMap((part) => {
    const divided = RESIDUALS.has(part.node.kind) && graph.partsOf(part.node.id).length > 0
    return divided ? summands(graph, part.node.id) : [part]
  })
}

/** The parts of a sublayer's result or of a head that a tree lists. */
function listedParts(graph: FlowGraph, { id, kind, layer, position }: GraphNode): Part[] {
  const sums = [id, ...(SUMS[kind] ?? []).map((sum) => `L${layer}/p${position}/${sum}`)]
  return sums.flatMap((sum) => graph.partsOf(sum)).filter(({ node }) => LISTED.has(node.kind))
}

/** The ids of a tree's nodes, and of the residuals that they read from and add to. */
export function pathIds({ node, parts }: ContributionTree): Set<string> {
  const { id, layer, position, source } = node
  const path = new Set([id])
  if (layer !== undefined) path.add(`L${layer}/p${position}/BLOCK_OUTPUT`)
  if (layer !== undefined && source !== undefined) {
    path.add(layer === 0 ? `p${source}/BLOCK_INPUT` : `L${layer - 1}/p${source}/BLOCK_OUTPUT`)
  }
  for (const part of parts) for (const below of pathIds(part)) path.add(below)
  return path
}

function contributes(edge: GraphEdge): boolean {
  return edge.logitContribution !== undefined && Number.isFinite(edge.logitContribution)
}

// A step back does not end at a remainder or a constant.
const DEAD_ENDS = new Set(['OTHER', 'ATTENTION_BIAS', 'MLP_BIAS'])

function stepBack(graph: FlowGraph, id: string): GraphNode | undefined {
  const node = graph.node(id)
  if (node?.kind === 'ATTENTION_SUM' || node?.kind === 'ATTENTION_OUTPUT') {
    const heads = graph.at(node.layer ?? 0, node.position, 'ATTENTION_CONCAT')
    if (heads) return heads
  }
  const edges = graph.edgesInto(id).filter((edge) => {
    const source = graph.node(edge.source)
    return source && !DEAD_ENDS.has(source.kind)
  })
  const edge = strongest(edges)
  return edge && graph.node(edge.source)
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

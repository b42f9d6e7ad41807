// Ways through the graph: the strongest source, the strongest destination, the strongest path.
import type { FlowGraph } from '../graph/graph'
import type { GraphEdge, GraphNode } from '../graph/nodes'

/** What a node is mostly made of, and what it mostly goes into. */
export function strongestSource(graph: FlowGraph, id: string): GraphNode | undefined {
  return stepBack(graph, id)?.node
}

export function strongestDestination(graph: FlowGraph, id: string): GraphNode | undefined {
  const edges = graph.edgesFrom(id).filter((edge) => graph.node(edge.target))
  const part = edges.find((edge) => edge.kind === 'PART') ?? edges[0]
  return part && graph.node(part.target)
}

/** One step of a path; its edge, if it has one, enters the step before. */
export interface Step {
  node: GraphNode
  edge: GraphEdge | undefined
}

const ENDS = ['PREDICTION', 'FINAL_NORM', 'BLOCK_OUTPUT']
// A remainder or a constant explains nothing further.
const DEAD_ENDS = new Set(['OTHER', 'ATTENTION_BIAS', 'MLP_BIAS'])

/**
 * The strongest chain from a position's prediction back to the embedding: the path that
 * `trace.path_to_target()` gives. At a sum it takes the part that adds most to the target's logit
 * (without contributions, the largest share), at attention's result the heads together, elsewhere
 * the heaviest edge.
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
    return best(parts, (part) => part.logitContribution ?? 0)
  }
  if (parts.length > 0) return best(parts, (part) => Math.abs(part.share ?? 0))
  return best(edges, (edge) => Math.abs(edge.weight))
}

function best<Item>(items: readonly Item[], of: (item: Item) => number): Item | undefined {
  let found: Item | undefined
  for (const item of items) if (found === undefined || of(item) > of(found)) found = item
  return found
}

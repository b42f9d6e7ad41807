import type { FlowGraph } from '../graph/graph'
import type { GraphNode } from '../graph/nodes'

/** A block without a residual between its halves, a parallel one, is one step. */
export type AnswerStep = 'embedding' | 'attention' | 'MLP' | 'block'

/** Where the target is on top of the residual stream for good. */
export interface Answer {
  node: GraphNode
  layer: number | undefined
  /** Which step brought it there. */
  step: AnswerStep
}

/** The residuals of a position from the embedding upwards, those that have a reading. */
export function residuals(graph: FlowGraph, position: number): GraphNode[] {
  const found: (GraphNode | undefined)[] = [graph.node(`p${position}/BLOCK_INPUT`)]
  for (const layer of [...graph.layers].sort((a, b) => a - b)) {
    found.push(graph.at(layer, position, 'RESIDUAL_MID'))
    found.push(graph.at(layer, position, 'BLOCK_OUTPUT'))
  }
  return found.filter((node) => node?.reading !== undefined) as GraphNode[]
}

/** The first residual from which on the target's rank is 0; undefined if it is not in the end. */
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

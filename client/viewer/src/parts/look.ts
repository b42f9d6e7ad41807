// What a node looks like besides its text: shared by the overview, the details and the inspector.
import { rankBin } from '../colour/bins'
import type { FlowGraph } from '../graph/graph'
import type { GraphNode, Scored } from '../graph/nodes'

/** What marks nodes: the selection, pins, a search, a followed path. */
export interface Marks {
  /** Equal for equal marks. */
  key: string
  selected: string
  pinned: ReadonlySet<string>
  /** Ids that a search found; undefined without a search. */
  found: ReadonlySet<string> | undefined
  /** Ids of the followed path; undefined when none is followed. */
  path: ReadonlySet<string> | undefined
}

/** Classes of a chip or cell; `dim` is what a search or a path leaves out. */
export function chipClass(
  node: GraphNode | undefined,
  graph: FlowGraph,
  marks: Marks,
  flipped = false,
): string {
  return node ? `chip bin-${binOf(node, graph, flipped)}${markClass(node, marks)}` : 'chip empty'
}

/** What marks a node, as classes behind others. */
export function markClass(node: GraphNode, marks: Marks): string {
  const classes = ['']
  if (node.id === marks.selected) classes.push('selected')
  if (marks.pinned.has(node.id)) classes.push('pinned')
  if (marks.found?.has(node.id)) classes.push('found')
  if (marks.path?.has(node.id)) classes.push('on-path')
  const left =
    (marks.found && !marks.found.has(node.id)) || (marks.path && !marks.path.has(node.id))
  if (left) classes.push('dim')
  return classes.join(' ')
}

/** The bin of the target's rank; a row that is read from its bottom is binned from there too. */
export function binOf(node: GraphNode, graph: FlowGraph, flipped = false): number {
  const rank = node.reading?.targetRank
  if (flipped && rank !== undefined && graph.vocabulary) {
    return rankBin(graph.vocabulary - 1 - rank, graph.vocabulary)
  }
  return rankBin(rank, graph.vocabulary)
}

/** The token that a node is shown as: its top one, or the bottom one where that is what it writes. */
export function face(node: GraphNode, flipped = false): Scored | undefined {
  return flipped ? node.reading?.bottom[0] : node.reading?.top[0]
}

/** Whether a node is written with a negative factor. */
export function isFlipped(node: GraphNode): boolean {
  return (node.activation ?? 0) < 0
}

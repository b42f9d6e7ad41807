// "Where is Tokyo?": every node that has a token among its top or bottom ones.
import type { FlowGraph } from '../graph/graph'
import type { GraphNode } from '../graph/nodes'
import { matcher } from '../label/matcher'
import type { Token } from '../label/tokens'

export interface Found {
  node: GraphNode
  token: Token
  end: 'top' | 'bottom'
  /** Place in the list of that end, 0 being the very end. */
  place: number
}

/** Every node that a query finds, with the first place where it does. */
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

// "Where is Tokyo?": every node that has a token among its top or bottom ones.
import type { FlowGraph } from '../graph/graph'
import type { GraphNode } from '../graph/nodes'
import type { Token } from '../label/tokens'

export interface Found {
  node: GraphNode
  token: Token
  end: 'top' | 'bottom'
  /** Place in the list of that end, 0 being the very end. */
  place: number
}

/** What a text finds: a token's id as `#719`, else any token whose text contains it. */
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

function matcher(query: string): ((token: Token) => boolean) | undefined {
  const id = query.match(/^#(\d+)$/)
  if (id) return (token) => token.id === Number(id[1])
  const text = query.trim().toLowerCase()
  if (text === '') return undefined
  const exactly = query.startsWith(' ') || query.startsWith('␣')
  if (exactly) {
    const label = `␣${text.replace(/^␣/, '')}`
    return (token) => token.label.toLowerCase() === label
  }
  return (token) => token.label.toLowerCase().includes(text)
}

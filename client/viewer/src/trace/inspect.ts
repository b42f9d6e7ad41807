// The inspector of the trace's page: the selected node, pinned ones compared, what was found.
import type { FlowGraph } from '../graph/graph'
import { element } from '../parts/dom'
import { comparison, nodeFacts, way } from '../parts/inspector'
import { count, percent, signed } from '../parts/numbers'
import type { Found } from './search'
import type { TraceState } from './state'
import type { Step } from './ways'

const SHOWN = 60

interface Shown {
  position: number
  found: readonly Found[]
  path: readonly Step[] | undefined
}

export function fillInspector(
  aside: HTMLElement,
  graph: FlowGraph,
  state: TraceState,
  shown: Shown,
): void {
  const sections: HTMLElement[] = []
  const query = state.get('q').trim()
  if (query !== '') sections.push(foundList(shown.found, query, graph))
  if (shown.path) sections.push(pathList(shown.path, graph))
  const pinned = state.list('pin').flatMap((id) => graph.node(id) ?? [])
  const selected = graph.node(state.get('sel'))
  if (pinned.length > 0) {
    const others = selected && !pinned.includes(selected) ? [selected] : []
    sections.push(comparison([...pinned, ...others], graph))
  }
  const node = selected ?? defaultNode(graph, shown.position)
  if (node) sections.push(nodeFacts(node, graph))
  aside.replaceChildren(...sections)
}

/** Before anything is selected: the prediction itself. */
function defaultNode(graph: FlowGraph, position: number) {
  return (
    graph.node(`p${position}/PREDICTION`) ??
    graph.at(Math.max(...graph.layers, 0), position, 'BLOCK_OUTPUT')
  )
}

function foundList(found: readonly Found[], query: string, graph: FlowGraph): HTMLElement {
  const sorted = [...found].sort((a, b) => a.place - b.place)
  const lines: HTMLElement[] = sorted
    .slice(0, SHOWN)
    .map(({ node, end, place }) => way(node, `${end === 'top' ? '▴' : '▾'} ${place}`, graph))
  const title = `“${query}” is read in ${count(found.length)} nodes`
  if (found.length > SHOWN) {
    lines.push(element('p', { class: 'quiet' }, `and ${found.length - SHOWN} more`))
  }
  const note = 'place among the top (▴) or bottom (▾) tokens'
  return section('found', title, note, lines)
}

function pathList(path: readonly Step[], graph: FlowGraph): HTMLElement {
  const lines = path.map(({ node, edge }) => {
    const logit = edge?.logitContribution
    const share = edge?.share
    const number = logit !== undefined ? signed(logit) : share !== undefined ? percent(share) : ''
    return way(node, number, graph)
  })
  const note = 'from the prediction back; what each step adds to the logit'
  return section('path', 'The strongest path', note, lines)
}

function section(
  name: string,
  title: string,
  note: string,
  lines: readonly HTMLElement[],
): HTMLElement {
  return element(
    'section',
    { class: name },
    element('h2', {}, title),
    element('p', { class: 'quiet' }, note),
    element('div', { class: 'lines' }, ...lines),
  )
}

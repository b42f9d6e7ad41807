// The table: the same nodes as the picture, for sorting, for copying and for screen readers.
import type { FlowGraph } from '../graph/graph'
import type { GraphNode } from '../graph/nodes'
import { element, tokenText } from '../parts/dom'
import { partOf } from '../parts/inspector'
import { face, isFlipped } from '../parts/look'
import { measure, percent, probability, signed } from '../parts/numbers'
import { inWords } from '../parts/words'

interface Column {
  name: string
  /** What it sorts by; undefined sorts last. */
  key: (node: GraphNode, graph: FlowGraph) => number | string | undefined
  show: (node: GraphNode, graph: FlowGraph) => Node | string
}

const shareOf = (node: GraphNode, graph: FlowGraph) => partOf(node, graph)?.share
const logitOf = (node: GraphNode, graph: FlowGraph) => partOf(node, graph)?.logitContribution

const COLUMNS: Column[] = [
  { name: 'node', key: (n, g) => inWords(n, g.prompt), show: (n, g) => inWords(n, g.prompt) },
  {
    name: 'says',
    key: (n) => face(n, isFlipped(n))?.token.label,
    show: (n) => tokenText(face(n, isFlipped(n))?.token.label ?? ''),
  },
  numeric('share', shareOf, percent),
  numeric('logit', logitOf, (v) => signed(v)),
  numeric(
    'attention',
    (n, g) => partOf(n, g)?.attention,
    (v) => v.toFixed(3),
  ),
  numeric('rank', (n) => n.reading?.targetRank, String),
  numeric('probability', (n) => n.reading?.targetProbability, probability),
  numeric('activation', (n) => n.activation, measure),
  numeric('norm', (n) => n.norm, measure),
  numeric('entropy', (n) => n.reading?.entropyBits, measure),
]

function numeric(
  name: string,
  key: (node: GraphNode, graph: FlowGraph) => number | undefined,
  words: (value: number) => string,
): Column {
  const show = (node: GraphNode, graph: FlowGraph) => {
    const value = key(node, graph)
    return value === undefined ? '' : words(value)
  }
  return { name, key, show }
}

/** A sortable table of nodes; a click on a row selects it, on a heading sorts by it. */
export function nodeTable(nodes: readonly GraphNode[], graph: FlowGraph): HTMLElement {
  const body = element('tbody')
  const fill = (sorted: readonly GraphNode[]) => fillRows(body, sorted, graph)
  let by: Column | undefined
  let down = true
  const headings = COLUMNS.map((column) => {
    const sort = element('button', { type: 'button' }, column.name)
    const heading = element('th', { scope: 'col', 'aria-sort': 'none' }, sort)
    sort.addEventListener('click', () => {
      down = by === column ? !down : true
      by = column
      for (const other of headings) other.setAttribute('aria-sort', 'none')
      heading.setAttribute('aria-sort', down ? 'descending' : 'ascending')
      fill([...nodes].sort((a, b) => compared(column.key(a, graph), column.key(b, graph), down)))
    })
    return heading
  })
  fill(nodes)
  const head = element('thead', {}, element('tr', {}, ...headings))
  return element('table', { class: 'nodes' }, head, body)
}

const AT_ONCE = 40 // rows; the others come a moment later, below what is seen

function fillRows(body: HTMLElement, nodes: readonly GraphNode[], graph: FlowGraph): void {
  const rows = nodes.slice(0, AT_ONCE).map((node) => tableRow(node, graph))
  body.replaceChildren(...rows)
  setTimeout(() => {
    if (rows[0]?.parentNode !== body) return // sorted anew meanwhile
    body.append(...nodes.slice(AT_ONCE).map((node) => tableRow(node, graph)))
  }, 30)
}

function compared(
  a: number | string | undefined,
  b: number | string | undefined,
  down: boolean,
): number {
  if (a === undefined || b === undefined) return a === b ? 0 : a === undefined ? 1 : -1
  const order = a < b ? -1 : a > b ? 1 : 0
  return down ? -order : order
}

function tableRow(node: GraphNode, graph: FlowGraph): HTMLElement {
  const cells = COLUMNS.map((column, i) =>
    i === 0
      ? element(
          'th',
          { scope: 'row' },
          element(
            'button',
            { type: 'button', class: 'way', 'data-id': node.id },
            column.show(node, graph),
          ),
        )
      : element('td', {}, column.show(node, graph)),
  )
  return element('tr', { 'data-id': node.id }, ...cells)
}

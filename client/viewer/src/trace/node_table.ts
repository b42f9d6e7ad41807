import { ChangeTracker } from '../browser/shell'
import type { FlowGraph, GraphNode } from '../model/flow_graph'
import { isFlipped, type Marks, markClass, shownToken } from '../presentation/colours'
import { element, tokenText } from '../presentation/elements'
import {
  at as atPosition,
  count,
  decimals,
  measure,
  NODE_NAMES,
  nodeName,
  percent,
  probability,
  signed,
} from '../presentation/wording'
import { partOf } from './inspector'

// The table of the same nodes as in the pictures of layers, for sorting, copying and screen readers.

interface Column {
  name: string
  /** The sort key; undefined sorts last. */
  key: (node: GraphNode, graph: FlowGraph) => number | string | undefined
  show: (node: GraphNode, graph: FlowGraph) => Node | string
}

const shareOf = (node: GraphNode, graph: FlowGraph) => partOf(node, graph)?.share
const logitOf = (node: GraphNode, graph: FlowGraph) => partOf(node, graph)?.logitContribution

const COLUMNS: Column[] = [
  { name: 'node', key: (n, g) => nodeName(n, g.prompt), show: (n, g) => nodeName(n, g.prompt) },
  {
    name: 'token',
    key: (n) => shownToken(n, isFlipped(n))?.token.label,
    show: (n) => tokenText(shownToken(n, isFlipped(n))?.token.label ?? ''),
  },
  numeric('share', shareOf, percent),
  numeric('logit', logitOf, (v) => signed(v)),
  numeric(
    'attention',
    (n, g) => partOf(n, g)?.attention,
    (v) => decimals(v, 3),
  ),
  numeric('rank', (n) => n.reading?.targetRank, count),
  numeric('probability', (n) => n.reading?.targetProbability, probability),
  numeric('activation', (n) => n.activation, measure),
  numeric('norm', (n) => n.norm, measure),
  numeric('entropy', (n) => n.reading?.entropyBits, measure),
]

function numeric(
  name: string,
  key: (node: GraphNode, graph: FlowGraph) => number | undefined,
  format: (value: number) => string,
): Column {
  const show = (node: GraphNode, graph: FlowGraph) => {
    const value = key(node, graph)
    return value === undefined ? '' : format(value)
  }
  return { name, key, show }
}

interface Actions {
  select: (id: string) => void
  pin: (id: string) => void
}

const AT_ONCE = 30 // rows; the rest are added later, below the visible part

/**
 * The nodes of layers at a position; clicking a row selects it, clicking a heading sorts. One row
 * is a Tab stop, and the arrow keys move between rows.
 */
export class NodeTable {
  readonly element = element('div')
  private readonly contentChanges = new ChangeTracker()
  private readonly markChanges = new ChangeTracker()
  private readonly title = element('h2')
  private readonly body = element('tbody')
  private readonly headings = COLUMNS.map((column) => this.heading(column))
  private readonly nodeOf = new Map<HTMLElement, GraphNode>()
  private nodes: GraphNode[] = []
  private by: Column | undefined
  private down = true
  private marks: Marks | undefined
  private revealed = ''

  constructor(
    private readonly graph: FlowGraph,
    actions: Actions,
  ) {
    const head = element('thead', {}, element('tr', {}, ...this.headings))
    const table = element('table', { class: 'nodes' }, head, this.body)
    this.element.append(this.title, element('div', { class: 'scroller' }, table))
    this.body.addEventListener('click', (event) => {
      const id = (event.target as Element).closest<HTMLElement>('tr')?.dataset.id
      if (id) (event.ctrlKey || event.metaKey ? actions.pin : actions.select)(id)
    })
    this.body.addEventListener('keydown', (event) => this.pressed(event))
  }

  draw(position: number, layers: readonly number[], marks: Marks): void {
    this.marks = marks
    const renewed = this.contentChanges.changed(position, String(layers), this.graph.labels)
    if (renewed) this.list(position, layers)
    if (this.markChanges.changed(marks.key) || renewed) this.mark()
  }

  /** Scrolls to the row of a node, as soon as it is there. */
  reveal(id: string): void {
    this.revealed = id
    const row = this.body.querySelector(`tr[data-id="${CSS.escape(id)}"]`)
    if (!row) return
    row.scrollIntoView({ block: 'nearest' })
    this.revealed = ''
  }

  private list(position: number, layers: readonly number[]): void {
    const { graph } = this
    const place = (node: GraphNode) =>
      graph.layerOf(node) * KINDS.length + placeInLayer(node, graph)
    this.nodes = [...graph.nodes.values()]
      .filter((node) => node.position === position && layers.includes(graph.layerOf(node)))
      .map((node) => ({ node, place: place(node) }))
      .sort((a, b) => a.place - b.place || (a.node.head ?? 0) - (b.node.head ?? 0))
      .map(({ node }) => node)
    this.title.textContent = `Nodes of layer ${layers.join(', ')} at ${atPosition(position, graph.prompt)}`
    this.fill()
  }

  private heading(column: Column): HTMLElement {
    const sort = element('button', { type: 'button' }, column.name)
    const heading = element('th', { scope: 'col', 'aria-sort': 'none' }, sort)
    sort.addEventListener('click', () => {
      this.down = this.by === column ? !this.down : true
      this.by = column
      for (const other of this.headings) other.setAttribute('aria-sort', 'none')
      heading.setAttribute('aria-sort', this.down ? 'descending' : 'ascending')
      this.fill()
      this.mark()
    })
    return heading
  }

  private fill(): void {
    const sorted = this.sorted()
    this.nodeOf.clear()
    const rows = sorted.slice(0, AT_ONCE).map((node) => this.row(node))
    this.body.replaceChildren(...rows)
    setTimeout(() => {
      if (rows[0]?.parentNode !== this.body) return // filled again in the meantime
      this.body.append(...sorted.slice(AT_ONCE).map((node) => this.row(node)))
      this.mark()
      if (this.revealed) this.reveal(this.revealed)
    }, 30)
  }

  private sorted(): GraphNode[] {
    const { by, graph, down } = this
    if (!by) return this.nodes
    return [...this.nodes].sort((a, b) => compared(by.key(a, graph), by.key(b, graph), down))
  }

  private row(node: GraphNode): HTMLElement {
    const row = tableRow(node, this.graph)
    this.nodeOf.set(row, node)
    return row
  }

  private mark(): void {
    const { marks } = this
    if (!marks) return
    for (const [row, node] of this.nodeOf) {
      row.className = markClass(node, marks).trim()
      if (node.id === marks.selected) row.setAttribute('aria-current', 'true')
      else row.removeAttribute('aria-current')
    }
    this.setTabStop()
  }

  private pressed(event: KeyboardEvent): void {
    const buttons = this.buttons()
    const at = buttons.indexOf(event.target as HTMLElement)
    const places: Record<string, number> = {
      ArrowUp: at - 1,
      ArrowDown: at + 1,
      Home: 0,
      End: buttons.length - 1,
    }
    const next = buttons[places[event.key] ?? -1]
    if (!next) return
    event.preventDefault()
    next.focus()
    this.setTabStop()
  }

  /** Makes the focused row, the selected one or the first one the only Tab stop. */
  private setTabStop(): void {
    const buttons = this.buttons()
    const focused = buttons.find((button) => button === document.activeElement)
    const selected = this.body.querySelector('tr[aria-current] .node-link')
    const stop = focused ?? selected ?? buttons[0]
    for (const button of buttons) button.tabIndex = button === stop ? 0 : -1
  }

  private buttons(): HTMLElement[] {
    return [...this.body.querySelectorAll<HTMLElement>('.node-link')]
  }
}

const LATE = ['MIXER_HEAD', 'MIXER_OUTPUT'] // listed last in NODE_NAMES
const SUBLAYER = 'ATTENTION_OUTPUT' // in whose place a mixer is
const KINDS = Object.keys(NODE_NAMES).flatMap((kind) => {
  if (LATE.includes(kind)) return []
  return kind === SUBLAYER ? [...LATE, kind] : [kind]
})

/** The order of a layer's computation; a remainder follows the other parts of its sum. */
function placeInLayer(node: GraphNode, graph: FlowGraph): number {
  if (node.kind !== 'OTHER') return KINDS.indexOf(node.kind)
  const sum = graph.node(partOf(node, graph)?.target ?? '')
  return sum && sum.kind !== 'OTHER' ? KINDS.indexOf(sum.kind) - 0.5 : KINDS.length - 1
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
            { type: 'button', class: 'node-link', 'data-id': node.id },
            column.show(node, graph),
          ),
        )
      : element('td', {}, column.show(node, graph)),
  )
  return element('tr', { 'data-id': node.id }, ...cells)
}

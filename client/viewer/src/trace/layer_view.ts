import { create } from 'd3-selection'
import { ChangeTracker } from '../browser/shell'
import type { FlowGraph, GraphNode } from '../model/flow_graph'
import { type SelectionFlow, selectionFlow } from '../model/graph_queries'
import { isFlipped, type Marks, shownToken } from '../presentation/colours'
import { element, type Tooltip, tokenText } from '../presentation/elements'
import type { Svg } from '../presentation/svg'
import {
  at as atPosition,
  decimals,
  measure,
  nodeName,
  percent,
  probability,
  signed,
} from '../presentation/wording'
import { type Filter, filterOf, type TraceState } from './controls'
import { partOf, preview } from './inspector'
import { drawDetail, markDetail } from './layer_drawing'
import { detailLayout } from './layer_layout'
import { layerModel } from './layer_model'
import { type Chip, Detail } from './layer_pieces'

/** The layers in detail, as pictures or as a table. */
export class Details {
  readonly element = element('section', { class: 'details' })
  private readonly pictures = new Map<number, Picture>()

  constructor(
    private readonly graph: FlowGraph,
    private readonly state: TraceState,
    private readonly tooltip: Tooltip,
    private readonly actions: Actions,
  ) {
    this.element.addEventListener('click', (event) => {
      const row = (event.target as Element).closest<HTMLElement>('table.nodes [data-id]')
      if (row?.dataset.id) actions.select(row.dataset.id)
    })
  }

  draw(width: number, position: number, marks: Marks, layers: readonly number[]): void {
    if (this.state.get('view') === 'table') {
      this.element.replaceChildren(this.table(position, layers))
      return
    }
    const filter = filterOf(this.state)
    const flow = selectionFlow(this.graph, marks.selected)
    const boxes = layers.map((layer) => {
      const picture = this.picture(layer)
      picture.draw(width, position, filter, marks, flow)
      return picture.element
    })
    if (
      boxes.some((box, i) => this.element.children[i] !== box) ||
      boxes.length < this.element.children.length
    ) {
      this.element.replaceChildren(...boxes)
    }
  }

  /** Scrolls to a node's chip if it is not visible. */
  reveal(id: string): void {
    const chip = this.element.querySelector(`svg.detail .chip[data-id="${CSS.escape(id)}"]`)
    chip?.scrollIntoView({ block: 'nearest', inline: 'nearest' })
  }

  private table(position: number, layers: readonly number[]): HTMLElement {
    const after = ({ kind }: GraphNode) => (kind === 'FINAL_NORM' || kind === 'PREDICTION' ? 1 : 0)
    const nodes = [...this.graph.nodes.values()]
      .filter((node) => node.position === position && layers.includes(this.graph.layerOf(node)))
      .sort((a, b) => after(a) - after(b) || this.graph.layerOf(a) - this.graph.layerOf(b))
    const title = `Nodes of layer ${layers.join(', ')} at ${atPosition(position, this.graph.prompt)}`
    const scroller = element('div', { class: 'scroller' }, nodeTable(nodes, this.graph))
    return element('div', {}, element('h2', {}, title), scroller)
  }

  private picture(layer: number): Picture {
    const known = this.pictures.get(layer)
    if (known) return known
    const made = new Picture(layer, this.graph, this.tooltip, this.actions)
    this.pictures.set(layer, made)
    return made
  }
}

export interface Actions {
  select: (id: string) => void
  pin: (id: string) => void
  /** Expands or collapses a head's W_O rows; `head` is `layer.head`. */
  openHead: (head: string) => void
}

/** The picture of one layer at a position. */
export class Picture {
  readonly element: HTMLElement
  private readonly layoutChanges = new ChangeTracker()
  private readonly markChanges = new ChangeTracker()
  private readonly title = element('h2')
  private readonly note = element('p', { class: 'quiet' })
  private readonly svg = create('svg')
    .attr('class', 'picture detail')
    .attr('role', 'group') as unknown as Svg
  private detail = new Detail(0)

  constructor(
    private readonly layer: number,
    private readonly graph: FlowGraph,
    private readonly tooltip: Tooltip,
    private readonly actions: Actions,
  ) {
    const picture = this.svg.node() as SVGSVGElement
    this.element = element('section', { class: 'layer' }, this.title, this.note, picture)
    picture.addEventListener('click', (event) => {
      const head = (event.target as Element).closest<SVGElement>('.toggle')?.dataset.head
      if (head) return this.actions.openHead(head)
      const chip = this.nearest(event)
      if (!chip) return
      const act = event.ctrlKey || event.metaKey ? this.actions.pin : this.actions.select
      act(chip.node.id)
    })
    picture.addEventListener('pointermove', (event) => this.hovered(event))
    picture.addEventListener('pointerleave', () => this.hovered(undefined))
  }

  draw(width: number, position: number, filter: Filter, marks: Marks, flow: SelectionFlow): void {
    const { graph } = this
    const placed = this.layoutChanges.changed(position, width, graph.labels, filter.key)
    if (placed) this.place(width, position, filter)
    if (this.markChanges.changed(marks.key) || placed) {
      markDetail(this.svg, this.detail, graph, marks, flow)
    }
  }

  private place(width: number, position: number, filter: Filter): void {
    const { graph, layer } = this
    const where = `Layer ${layer} at ${atPosition(position, graph.prompt)}`
    this.title.textContent = where
    this.svg.attr('aria-label', where)
    const traced = graph.traced.includes(position)
    this.detail = traced
      ? detailLayout(layerModel(graph, layer, position), graph, filter, width)
      : new Detail(width)
    if (traced) drawDetail(this.svg, this.detail, graph)
    this.note.textContent = traced ? '' : notTraced(position)
    this.note.hidden = traced
    this.svg.attr('hidden', traced ? null : '')
  }

  private nearest(event: MouseEvent): Chip | undefined {
    const box = this.svg.node()?.getBoundingClientRect()
    if (!box) return undefined
    const [x, y] = [event.clientX - box.left, event.clientY - box.top]
    let best: Chip | undefined
    let least = 14 // px; clicks farther away select nothing
    for (const chip of this.detail.chips) {
      const dx = Math.max(chip.x - x, x - chip.x - chip.width, 0)
      const dy = Math.max(chip.y - y, y - chip.y - chip.height, 0)
      const far = Math.hypot(dx, dy)
      if (far < least) {
        best = chip
        least = far
      }
    }
    return best ?? this.ribbonAt(event)
  }

  private ribbonAt(event: MouseEvent): Chip | undefined {
    const id = (event.target as Element).closest('.ribbon')?.getAttribute('data-id')
    return this.detail.chips.find((chip) => chip.node.id === id)
  }

  private hovered(event: PointerEvent | undefined): void {
    const chip = event && this.nearest(event)
    const previous = this.svg.node()?.querySelector('.hovered')
    previous?.classList.remove('hovered')
    if (!event || !chip) {
      this.tooltip.hide()
      return
    }
    const own = this.svg.node()?.querySelector(`g.chip[data-id="${CSS.escape(chip.node.id)}"]`)
    own?.classList.add('hovered')
    this.tooltip.show(preview(chip.node, this.graph), event.clientX, event.clientY)
  }
}

function notTraced(position: number): string {
  return `Heads and neurons of this position are not in this trace. To see them, trace with --positions ${position}.`
}

// The table of the same nodes as in the picture, for sorting, copying and screen readers.

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
  numeric('rank', (n) => n.reading?.targetRank, String),
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

/** A table of nodes; clicking a row selects it, clicking a heading sorts. */
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

const AT_ONCE = 40 // rows; the rest are added later, below the visible part

function fillRows(body: HTMLElement, nodes: readonly GraphNode[], graph: FlowGraph): void {
  const rows = nodes.slice(0, AT_ONCE).map((node) => tableRow(node, graph))
  body.replaceChildren(...rows)
  setTimeout(() => {
    if (rows[0]?.parentNode !== body) return // sorted again in the meantime
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
            { type: 'button', class: 'node-link', 'data-id': node.id },
            column.show(node, graph),
          ),
        )
      : element('td', {}, column.show(node, graph)),
  )
  return element('tr', { 'data-id': node.id }, ...cells)
}

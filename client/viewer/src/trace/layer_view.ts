import { create } from 'd3-selection'
import { ChangeTracker } from '../browser/shell'
import type { FlowGraph } from '../model/flow_graph'
import { type SelectionFlow, selectionFlow } from '../model/graph_queries'
import type { Marks } from '../presentation/colours'
import { element, type Tooltip } from '../presentation/elements'
import type { Svg } from '../presentation/svg'
import { at as atPosition } from '../presentation/wording'
import { type Filter, filterOf, type TraceState } from './controls'
import { preview } from './inspector'
import { drawDetail, markDetail } from './layer_drawing'
import { detailLayout } from './layer_layout'
import { layerModel } from './layer_model'
import { type Chip, Detail } from './layer_pieces'
import { NodeTable } from './node_table'

/** The layers in detail, as pictures or as a table. */
export class Details {
  readonly element = element('section', { class: 'details' })
  private readonly pictures = new Map<number, Picture>()
  private readonly table: NodeTable

  constructor(
    private readonly graph: FlowGraph,
    private readonly state: TraceState,
    private readonly tooltip: Tooltip,
    private readonly actions: Actions,
  ) {
    this.table = new NodeTable(graph, actions)
  }

  draw(width: number, position: number, marks: Marks, layers: readonly number[]): void {
    if (this.state.get('view') === 'table') {
      this.table.draw(position, layers, marks)
      if (this.element.firstChild !== this.table.element)
        this.element.replaceChildren(this.table.element)
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

  /** Scrolls to a node's chip or row if it is not visible. */
  reveal(id: string): void {
    const chip = this.element.querySelector(`svg.detail .chip[data-id="${CSS.escape(id)}"]`)
    if (chip) chip.scrollIntoView({ block: 'nearest', inline: 'nearest' })
    else this.table.reveal(id)
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

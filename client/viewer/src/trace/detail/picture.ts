import { create } from 'd3-selection'
import type { FlowGraph } from '../../graph/graph'
import { Once } from '../../page/once'
import { element } from '../../parts/dom'
import type { Marks } from '../../parts/look'
import type { Svg } from '../../parts/svg'
import type { Tooltip } from '../../parts/tooltip'
import { at as atPosition } from '../../parts/words'
import type { Filter } from '../filter'
import type { Followed } from '../follow'
import { preview } from '../preview'
import { drawDetail } from './draw'
import { detailLayout } from './layout'
import { markDetail } from './marks'
import { layerModel } from './model'
import { type Chip, Detail } from './placing'

export interface Actions {
  select: (id: string) => void
  pin: (id: string) => void
  /** Lists a head's rows of W_O, or no more; `head` is `layer.head`. */
  openHead: (head: string) => void
}

/** One layer's picture at a position. */
export class Picture {
  readonly element: HTMLElement
  private readonly placed = new Once()
  private readonly marked = new Once()
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

  draw(width: number, position: number, filter: Filter, marks: Marks, way: Followed): void {
    const { graph } = this
    const placed = this.placed.differs(position, width, graph.version, filter.key)
    if (placed) this.place(width, position, filter)
    if (this.marked.differs(marks.key) || placed) {
      markDetail(this.svg, this.detail, graph, marks, way)
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
    let least = 14 // px: farther away is nothing meant
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
  return `Heads and neurons were not asked for here: trace with --positions ${position}.`
}

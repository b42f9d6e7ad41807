import { create } from 'd3-selection'
import type { FlowGraph } from '../../graph/graph'
import { Once } from '../../page/once'
import { element } from '../../parts/dom'
import type { Marks } from '../../parts/look'
import type { Svg } from '../../parts/svg'
import type { Tooltip } from '../../parts/tooltip'
import { drawLegend, LEGEND_HEIGHT } from '../legend'
import { preview } from '../preview'
import { drawGrid, residualAt } from './draw'
import { type Layout, layout, nearest } from './layout'
import { markGrid } from './marks'
import { drawAnswer, drawPanel } from './panel'

interface Actions {
  select: (id: string) => void
  pin: (id: string) => void
  toggleLayer: (layer: number) => void
}

export const PANEL = 214
const LABELS = 44 // a click left of this is on a row's label

/** The grid of all residuals with the panel beside it. */
export class Overview {
  readonly element: HTMLElement
  private readonly svg = create('svg').attr('class', 'picture overview') as unknown as Svg
  private readonly placed = new Once()
  private readonly marked = new Once()
  private at: Layout | undefined

  constructor(
    private readonly graph: FlowGraph,
    private readonly tooltip: Tooltip,
    private readonly actions: Actions,
  ) {
    const picture = this.svg.node() as SVGSVGElement
    this.element = element('section', { class: 'overview-box' }, picture)
    this.svg.attr('role', 'grid').attr('aria-label', 'The residual stream, layers upward')
    picture.addEventListener('click', (event) => this.clicked(event))
    picture.addEventListener('pointermove', (event) => this.hovered(event))
    picture.addEventListener('pointerleave', () => this.tooltip.hide())
  }

  draw(width: number, position: number, marks: Marks, shown: readonly number[]): void {
    const { graph, svg } = this
    const placed = this.placed.differs(width, position, graph.version)
    if (placed) this.place(width, position)
    if (this.marked.differs(marks.key, String(shown)) || placed) {
      markGrid(svg, graph, position, marks, shown)
    }
  }

  private place(width: number, position: number): void {
    const { graph, svg } = this
    const layers = [...graph.layers].sort((a, b) => a - b)
    const at = layout(graph.prompt.length, layers, position, width, PANEL)
    this.at = { ...at, height: at.height + LEGEND_HEIGHT }
    drawGrid(svg, { graph, at, position })
    drawPanel(svg, graph, at, position)
    drawAnswer(svg, graph, at, position)
    svg.attr('height', this.at.height).attr('viewBox', `0 0 ${at.width} ${this.at.height}`)
    drawLegend(svg, graph.targets.get(position)?.target.label ?? '', at.height, at.width)
  }

  private idAt(event: MouseEvent): string | undefined {
    const target = event.target as Element
    const arc = target.closest('.arc')?.getAttribute('data-id')
    if (arc) return arc
    const box = this.svg.node()?.getBoundingClientRect()
    if (!box || !this.at) return undefined
    const found = nearest(this.at, event.clientX - box.left, event.clientY - box.top)
    return found && residualAt(this.graph, found.row.layer, found.column.position)?.id
  }

  private clicked(event: MouseEvent): void {
    const box = this.svg.node()?.getBoundingClientRect()
    const id = this.idAt(event)
    if (!box || !this.at || !id) return
    const layer = this.graph.node(id)?.layer
    if (event.clientX - box.left < LABELS && layer !== undefined) this.actions.toggleLayer(layer)
    else if (event.ctrlKey || event.metaKey) this.actions.pin(id)
    else this.actions.select(id)
  }

  private hovered(event: PointerEvent): void {
    const box = this.svg.node()?.getBoundingClientRect()
    const inside = box && this.at && event.clientX - box.left < this.at.panelX - 8
    const id = inside ? this.idAt(event) : undefined
    const node = id ? this.graph.node(id) : undefined
    if (node) this.tooltip.show(preview(node, this.graph), event.clientX, event.clientY)
    else this.tooltip.hide()
  }
}

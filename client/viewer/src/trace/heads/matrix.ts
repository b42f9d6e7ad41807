import { create } from 'd3-selection'
import type { FlowGraph } from '../../graph/graph'
import { Once } from '../../page/once'
import { element } from '../../parts/dom'
import type { Marks } from '../../parts/look'
import type { Svg } from '../../parts/svg'
import type { Tooltip } from '../../parts/tooltip'
import { LEGEND_HEIGHT } from '../legend'
import { headLayout } from '../overview/layout'
import { PANEL } from '../overview/overview'
import { drawPanel } from '../overview/panel'
import { preview } from '../preview'
import { drawHeads, markHeads } from './draw'
import { drawHeadLegend } from './legend'
import { headsAt } from './model'

interface Actions {
  open: (id: string) => void
  pin: (id: string) => void
}

/** All heads of a position, layers upward: for scanning which of them matter. */
export class HeadMatrix {
  readonly element: HTMLElement
  private readonly svg = create('svg').attr('class', 'picture heads') as unknown as Svg
  private readonly placed = new Once()
  private readonly marked = new Once()

  constructor(
    private readonly graph: FlowGraph,
    private readonly tooltip: Tooltip,
    actions: Actions,
  ) {
    const picture = this.svg.node() as SVGSVGElement
    this.element = element('section', { class: 'overview-box' }, picture)
    this.svg.attr('role', 'grid').attr('aria-label', 'The heads, layers upward')
    picture.addEventListener('click', (event) => {
      const id = idOf(event)
      if (id) (event.ctrlKey || event.metaKey ? actions.pin : actions.open)(id)
    })
    picture.addEventListener('pointermove', (event) => this.hovered(event))
    picture.addEventListener('pointerleave', () => this.tooltip.hide())
  }

  draw(width: number, position: number, marks: Marks, shown: readonly number[]): void {
    const placed = this.placed.differs(width, position, this.graph.version)
    if (placed) this.place(width, position)
    if (this.marked.differs(marks.key, String(shown)) || placed) markHeads(this.svg, marks, shown)
  }

  private place(width: number, position: number): void {
    const { graph, svg } = this
    const of = headsAt(graph, position)
    const layers = [...graph.layers].sort((a, b) => a - b)
    const at = headLayout(of.columns, layers, width, PANEL)
    const height = at.height + LEGEND_HEIGHT
    svg.attr('width', width).attr('height', height).attr('viewBox', `0 0 ${width} ${height}`)
    drawHeads(svg, graph, at, of)
    drawPanel(svg, graph, at, position)
    drawHeadLegend(svg, at, of)
  }

  private hovered(event: PointerEvent): void {
    const node = this.graph.node(idOf(event) ?? '')
    if (node) this.tooltip.show(preview(node, this.graph), event.clientX, event.clientY)
    else this.tooltip.hide()
  }
}

function idOf(event: Event): string | undefined {
  return (event.target as Element).closest<SVGElement>('[data-id]')?.dataset.id
}

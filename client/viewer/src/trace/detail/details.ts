import { create } from 'd3-selection'
import type { FlowGraph } from '../../graph/graph'
import type { GraphNode } from '../../graph/nodes'
import { Once } from '../../page/once'
import { element } from '../../parts/dom'
import type { Marks } from '../../parts/look'
import type { Svg } from '../../parts/svg'
import type { Tooltip } from '../../parts/tooltip'
import { at as atPosition } from '../../parts/words'
import { filterOf } from '../filter'
import { preview } from '../preview'
import type { TraceState } from '../state'
import { nodeTable } from '../table'
import { fractions } from '../ways'
import { drawDetail } from './draw'
import { detailLayout } from './layout'
import { layerModel } from './model'
import type { Chip } from './placing'

interface Actions {
  select: (id: string) => void
  pin: (id: string) => void
}

/** The layers in detail below the overview, as pictures or as a table. */
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
    const boxes = layers.map((layer) => this.picture(layer, width, position, marks))
    if (
      boxes.some((box, i) => this.element.children[i] !== box) ||
      boxes.length < this.element.children.length
    ) {
      this.element.replaceChildren(...boxes)
    }
  }

  private table(position: number, layers: readonly number[]): HTMLElement {
    const nodes: GraphNode[] = []
    for (const node of this.graph.nodes.values()) {
      const here = node.layer === undefined || layers.includes(node.layer)
      if (here && node.position === position) nodes.push(node)
    }
    const title = `Nodes of layer ${layers.join(', ')} at ${atPosition(position, this.graph.prompt)}`
    const scroller = element('div', { class: 'scroller' }, nodeTable(nodes, this.graph))
    return element('div', {}, element('h2', {}, title), scroller)
  }

  private picture(layer: number, width: number, position: number, marks: Marks): HTMLElement {
    let picture = this.pictures.get(layer)
    if (!picture) {
      picture = new Picture(this.graph, this.tooltip, this.actions)
      this.pictures.set(layer, picture)
    }
    const filters = ['hide', 'min', 'sign'].map((key) => this.state.get(key as 'hide')).join(' ')
    const { version } = this.graph
    if (!picture.drawn.differs(position, width, version, marks.key, filters)) return picture.element
    const model = layerModel(this.graph, layer, position)
    const where = `Layer ${layer} at ${atPosition(position, this.graph.prompt)}`
    picture.title.textContent = where
    picture.svg.attr('aria-label', where)
    const traced = this.graph.traced.includes(position)
    if (traced) {
      const detail = detailLayout(model, this.graph, filterOf(this.state), width)
      picture.chips = detail.chips
      const fraction = fractions(this.graph, marks.selected)
      drawDetail(picture.svg, { detail, graph: this.graph, marks, fraction })
    }
    picture.note.textContent = traced ? '' : notTraced(position)
    picture.note.hidden = traced
    picture.svg.attr('hidden', traced ? null : '')
    return picture.element
  }
}

function notTraced(position: number): string {
  return `Heads and neurons were not asked for here: trace with --positions ${position}.`
}

/** One layer's picture. */
class Picture {
  readonly drawn = new Once()
  readonly title = element('h2')
  readonly note = element('p', { class: 'quiet' })
  readonly svg = create('svg')
    .attr('class', 'picture detail')
    .attr('role', 'group') as unknown as Svg
  readonly element: HTMLElement
  chips: readonly Chip[] = []

  constructor(
    private readonly graph: FlowGraph,
    private readonly tooltip: Tooltip,
    private readonly actions: Actions,
  ) {
    const picture = this.svg.node() as SVGSVGElement
    this.element = element('section', { class: 'layer' }, this.title, this.note, picture)
    picture.addEventListener('click', (event) => {
      const chip = this.nearest(event)
      if (!chip) return
      const act = event.ctrlKey || event.metaKey ? this.actions.pin : this.actions.select
      act(chip.node.id)
    })
    picture.addEventListener('pointermove', (event) => this.hovered(event))
    picture.addEventListener('pointerleave', () => this.hovered(undefined))
  }

  private nearest(event: MouseEvent): Chip | undefined {
    const box = this.svg.node()?.getBoundingClientRect()
    if (!box) return undefined
    const [x, y] = [event.clientX - box.left, event.clientY - box.top]
    let best: Chip | undefined
    let least = 14 // px: farther away is nothing meant
    for (const chip of this.chips) {
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
    return this.chips.find((chip) => chip.node.id === id)
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

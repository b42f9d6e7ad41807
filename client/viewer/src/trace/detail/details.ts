import type { FlowGraph } from '../../graph/graph'
import type { GraphNode } from '../../graph/nodes'
import { element } from '../../parts/dom'
import type { Marks } from '../../parts/look'
import type { Tooltip } from '../../parts/tooltip'
import { at as atPosition } from '../../parts/words'
import { filterOf } from '../filter'
import { follow } from '../follow'
import type { TraceState } from '../state'
import { nodeTable } from '../table'
import { type Actions, Picture } from './picture'

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
    const filter = filterOf(this.state)
    const way = follow(this.graph, marks.selected)
    const boxes = layers.map((layer) => {
      const picture = this.picture(layer)
      picture.draw(width, position, filter, marks, way)
      return picture.element
    })
    if (
      boxes.some((box, i) => this.element.children[i] !== box) ||
      boxes.length < this.element.children.length
    ) {
      this.element.replaceChildren(...boxes)
    }
  }

  /** Scrolls to a node's chip, if it is out of sight. */
  reveal(id: string): void {
    const chip = this.element.querySelector(`svg.detail .chip[data-id="${CSS.escape(id)}"]`)
    chip?.scrollIntoView({ block: 'nearest', inline: 'nearest' })
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

  private picture(layer: number): Picture {
    const known = this.pictures.get(layer)
    if (known) return known
    const made = new Picture(layer, this.graph, this.tooltip, this.actions)
    this.pictures.set(layer, made)
    return made
  }
}

import { create } from 'd3-selection'
import type { TraceResponse } from '../contract/messages'
import { FlowGraph } from '../graph/graph'
import { messages } from '../page/blocks'
import { type Shell, shell } from '../page/shell'
import { setTheme, type Theme } from '../page/theme'
import { nodeFacts } from '../parts/inspector'
import { drawGrid } from './overview/draw'
import { layout, nearest } from './overview/layout'
import { traceState } from './state'

/** Shows the trace that the page holds: replays its streams, overview first. */
export async function tracePage(): Promise<void> {
  const view = new TraceView(shell())
  for (const stream of ['trace', 'overview']) {
    for await (const message of messages<TraceResponse>(stream)) view.feed(message)
  }
  view.draw()
}

/** A trace on the screen; fed by a recorded stream or by a live one. */
export class TraceView {
  readonly graph = new FlowGraph()
  private readonly state = traceState()
  private readonly overview = create('svg').attr('class', 'picture overview')

  constructor(private readonly parts: Shell) {
    const picture = this.overview.node()
    if (picture) parts.main.append(picture)
    this.overview.attr('role', 'grid').attr('aria-label', 'Residual stream')
    this.overview.on('click', (event: MouseEvent) => this.select(event))
    this.state.subscribe(() => this.draw())
    new ResizeObserver(() => this.draw()).observe(parts.main)
  }

  feed(message: TraceResponse): void {
    this.graph.feed(message)
  }

  draw(): void {
    setTheme(this.state.get('theme') as Theme)
    const { graph } = this
    if (graph.prompt.length === 0) return
    const at = this.layout()
    this.overview.attr('width', at.width).attr('height', at.height)
    drawGrid(this.overview as never, graph, at, this.position())
    const node = graph.node(this.state.get('sel'))
    this.parts.aside.replaceChildren(...(node ? [nodeFacts(node, graph)] : []))
  }

  private layout() {
    const layers = [...this.graph.layers].sort((a, b) => a - b)
    const width = this.parts.main.clientWidth
    return layout(this.graph.prompt.length, layers, this.position(), width, 220)
  }

  private position(): number {
    const chosen = this.state.get('pos')
    return chosen === '' ? Math.max(...this.graph.traced) : Number(chosen)
  }

  private select(event: MouseEvent): void {
    const box = this.overview.node()?.getBoundingClientRect()
    if (!box) return
    const found = nearest(this.layout(), event.clientX - box.left, event.clientY - box.top)
    if (!found) return
    const { column, row } = found
    const id =
      row.layer < 0
        ? `p${column.position}/BLOCK_INPUT`
        : `L${row.layer}/p${column.position}/BLOCK_OUTPUT`
    this.state.set({ sel: id, pos: String(column.position) })
  }
}

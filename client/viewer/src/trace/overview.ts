import { create } from 'd3-selection'
import { ChangeTracker } from '../browser/shell'
import { finite } from '../contract'
import type { FlowGraph, GraphNode } from '../model/flow_graph'
import { answerAppears, type ResidualStep } from '../model/graph_queries'
import { fitted } from '../model/tokens'
import { BINS, type Marks } from '../presentation/colours'
import { element, type Tooltip } from '../presentation/elements'
import { type Column, groupNamed, type Svg } from '../presentation/svg'
import { count, probability } from '../presentation/wording'
import { arcLegend, readBy } from './arcs'
import type { Filter } from './controls'
import { preview } from './inspector'
import { drawFiltered, drawGrid, type Grid, markGrid, residualAt } from './overview_grid'
import {
  EMBEDDING,
  flagLine,
  type Layout,
  layout,
  nearest,
  panelWidth,
  type Row,
} from './overview_layout'

interface Actions {
  select: (id: string) => void
  pin: (id: string) => void
  toggleLayer: (layer: number) => void
}

const LABELS = 44 // px; clicks left of this are on a row's label
const FAR = 90 // px between the selected column and the ranks beyond which both are not shown

/** The grid of all residuals and the target panel beside it. */
export class Overview {
  readonly element: HTMLElement
  private readonly svg = create('svg').attr('class', 'picture overview') as unknown as Svg
  private readonly filterChanges = new ChangeTracker()
  private readonly columnChanges = new ChangeTracker()
  private readonly markChanges = new ChangeTracker()
  private readonly scrollChanges = new ChangeTracker()
  private readonly rowLabels = element('div', { class: 'row-labels', 'aria-hidden': 'true' })
  private at: Layout | undefined

  constructor(
    private readonly graph: FlowGraph,
    private readonly tooltip: Tooltip,
    private readonly actions: Actions,
  ) {
    const picture = this.svg.node() as SVGSVGElement
    this.element = element('section', { class: 'overview-box' }, this.rowLabels, picture)
    this.rowLabels.addEventListener('click', ({ target }) => {
      const { layer } = (target as HTMLElement).dataset
      if (layer) actions.toggleLayer(Number(layer))
    })
    this.svg
      .attr('role', 'grid')
      .attr('aria-label', 'Residual stream by token and layer, first layer at the bottom')
    picture.addEventListener('click', (event) => this.clicked(event))
    picture.addEventListener('pointermove', (event) => this.hovered(event))
    picture.addEventListener('pointerleave', () => this.tooltip.hide())
  }

  draw(
    width: number,
    position: number,
    marks: Marks,
    shown: readonly number[],
    filter: Filter,
  ): void {
    const { graph, svg } = this
    const shownArcs = `${filter.key} ${filter.arcs}`
    const placed = this.filterChanges.changed(width, position, graph.version, shownArcs)
    if (placed) this.place(width, position, filter)
    if (this.markChanges.changed(marks.key, String(shown)) || placed) {
      markGrid(svg, graph, position, marks, shown)
    }
  }

  /** The drawn width; a short prompt does not need all of the room. */
  get width(): number {
    return this.at?.width ?? 0
  }

  get height(): number {
    return this.at?.height ?? 0
  }

  private place(room: number, position: number, filter: Filter): void {
    const { graph, svg } = this
    const layers = [...graph.layers].sort((a, b) => a - b)
    // While messages arrive, columns do not move.
    const read = graph.complete ? readBy(graph, position, filter) : []
    const full = layout(graph.prompt.length, layers, position, room, read)
    const at = {
      ...full,
      width: Math.min(room, Math.max(LEGEND_WIDTH, full.panelX + panelWidth(room))),
    }
    const grid = { graph, at, position, filter }
    const labelled = at.columns.filter((column) => column.labelled).map((c) => c.position)
    if (this.columnChanges.changed(room, position, graph.version, String(labelled))) {
      drawGrid(svg, grid)
      drawPanel(svg, graph, at, position)
      drawAnswer(svg, graph, at, position)
    } else {
      drawFiltered(svg, grid) // cells keep their places
    }
    const keys = keysFor(grid)
    const height = at.height + LEGEND_HEIGHT + LEGEND_LINE * (keys.at(-1)?.line ?? 0)
    this.at = { ...at, height }
    svg.attr('height', height).attr('viewBox', `0 0 ${at.width} ${height}`)
    drawLegend(svg, keys, at.height)
  }

  /**
   * In a window that is `narrower` than the picture, shows the selected column with its ranks, and
   * labels of the rows that stay when the picture scrolls.
   */
  reveal(position: number, shown: readonly number[], narrower: boolean): void {
    const { at } = this
    const column = at?.columns[position]
    this.rowLabels.hidden = !narrower
    if (!narrower || !at || !column) return
    if (this.scrollChanges.changed(column.x, column.width, at.panelX)) {
      const end = Math.min(at.panelX + RANK, column.x + column.width + FAR)
      this.element.scrollLeft = end + 6 - this.element.clientWidth
    }
    this.rowLabels.replaceChildren(...at.rows.map((row) => rowLabel(row, at, shown)))
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

/** A label that stays at the edge; clicking it opens its layer, as in the picture. */
function rowLabel({ layer, y }: Row, at: Layout, shown: readonly number[]): HTMLElement {
  const embedding = layer === EMBEDDING
  const text = element('span', { 'data-layer': embedding ? '' : String(layer) })
  text.textContent = embedding ? 'emb' : `L${layer}`
  text.classList.toggle('shown', shown.includes(layer))
  text.style.top = `${y}px`
  text.style.height = text.style.lineHeight = `${at.cellHeight}px`
  return text
}

// The target panel: the target's rank and probability by layer at the selected position, and the
// layer from which it stays ranked first.

interface Line {
  y: number
  node: GraphNode
  rank: number
  probability: number
  logProbability: number | undefined
}

const RANK = 46
const BAR = 58
const SLIM_BAR = 52 // px; the number is in place of the bar
const BAR_WIDTH = 84

/** The groups of the panel. */
export const PANEL_PARTS = ['panel-heading', 'ranks', 'probabilities', 'probability-numbers']

export function drawPanel(svg: Svg, graph: FlowGraph, at: Layout, position: number): void {
  const lines = linesOf(graph, at, position)
  const x = at.panelX
  heading(svg, graph, at, position)
  const ranks = groupNamed(svg, 'ranks').selectAll('text').data(lines).join('text')
  ranks
    .attr('x', x + RANK)
    .attr('y', (line) => line.y)
    .attr('text-anchor', 'end')
    .attr('dominant-baseline', 'central')
    .attr('class', (line) => (line.rank === 0 ? 'number strong' : 'number'))
    .text((line) => count(line.rank))
  const [bar, barWidth] = at.slim ? [SLIM_BAR - 6, 0] : [BAR, BAR_WIDTH]
  const barred = at.slim ? [] : lines
  const bars = groupNamed(svg, 'probabilities').selectAll('rect').data(barred).join('rect')
  bars
    .attr('x', x + BAR)
    .attr('y', (line) => line.y - 5)
    .attr('width', (line) => Math.max(1, barWidth * finite(line.probability)))
    .attr('height', 10)
    .attr('rx', 2)
  const numbers = groupNamed(svg, 'probability-numbers').selectAll('text').data(lines).join('text')
  numbers
    .attr('x', (line) => x + bar + barWidth * finite(line.probability) + 6)
    .attr('y', (line) => line.y)
    .attr('dominant-baseline', 'central')
    .attr('class', 'number')
    .text((line) => probability(line.probability, line.logProbability))
}

function linesOf(graph: FlowGraph, at: Layout, position: number): Line[] {
  const lines: Line[] = []
  for (const row of at.rows) {
    const node =
      row.layer === EMBEDDING
        ? graph.node(`p${position}/BLOCK_INPUT`)
        : graph.at(row.layer, position, 'BLOCK_OUTPUT')
    const reading = node?.reading
    if (!node || reading?.targetRank === undefined) continue
    lines.push({
      y: row.y + at.cellHeight / 2,
      node,
      rank: reading.targetRank,
      probability: reading.targetProbability ?? 0,
      logProbability: reading.targetLogProbability,
    })
  }
  return lines
}

function heading(svg: Svg, graph: FlowGraph, at: Layout, position: number): void {
  const target = graph.targets.get(position)?.target.label ?? ''
  const text = [
    { x: at.panelX + RANK, text: 'rank', anchor: 'end' },
    {
      x: at.panelX + (at.slim ? SLIM_BAR : BAR),
      text: at.slim ? 'probability' : `probability of ${fitted(target, 12)}`,
      anchor: 'start',
    },
  ]
  groupNamed(svg, 'panel-heading')
    .selectAll('text')
    .data(text)
    .join('text')
    .attr('class', 'column')
    .attr('x', (w) => w.x)
    .attr('y', 14)
    .attr('text-anchor', (w) => w.anchor)
    .text((w) => w.text)
}

/** Marks the residuals at which the target stays ranked first: a tinted column and a label. */
export function drawAnswer(svg: Svg, graph: FlowGraph, at: Layout, position: number): void {
  const answer = answerAppears(graph, position)
  const layer = answer?.node.layer ?? EMBEDDING
  const row = answer && at.rows.find((r) => r.layer === layer)
  const column = at.columns.find((c) => c.position === position)
  const lines = answer ? flagLines(answer, at.slim) : []
  const marks = row && column && lines.length > 0 ? [{ row, column, lines }] : []
  const bottom = (mark: Mark) => mark.row.y + at.cellHeight
  // Between low rows there is no room for the label, so it goes below the panel.
  const between = at.cellHeight >= LABEL_FITS && !at.slim
  const widthOf = (mark: Mark) => Math.max(...mark.lines.map(({ length }) => length)) * 6.3 + 22
  const left = (mark: Mark) => Math.min(at.panelX + 20, at.width - widthOf(mark) + 10)
  const labelY = (mark: Mark) => (between ? bottom(mark) + 5 : at.height - 20)
  groupNamed(svg, 'answer')
    .selectAll('rect')
    .data(marks)
    .join('rect')
    .attr('class', 'answer-band')
    .attr('x', (m) => m.column.x - 6)
    .attr('width', (m) => m.column.width + 12)
    .attr('y', 22)
    .attr('height', (m) => bottom(m) + 6 - 22)
    .attr('rx', 10)
  const flag = groupNamed(svg, 'flag')
  flag
    .selectAll('path')
    .data(marks)
    .join('path')
    .attr('class', 'flag-line')
    .attr('d', (m) =>
      flagLine(m.column.x + m.column.width + 6, bottom(m) + 5, at.panelX, labelY(m)),
    )
  flag
    .selectAll('rect')
    .data(marks)
    .join('rect')
    .attr('class', 'flag-box')
    .attr('x', (m) => left(m) - 10)
    .attr('y', (m) => labelY(m) - 2 - FLAG_LINE * (m.lines.length / 2))
    .attr('width', widthOf)
    .attr('height', (m) => 4 + FLAG_LINE * m.lines.length)
    .attr('rx', 9)
  flag
    .selectAll('text')
    .data(marks.flatMap((mark) => mark.lines.map((text, i) => ({ mark, text, i }))))
    .join('text')
    .attr('class', 'flag-text')
    .attr('x', ({ mark }) => left(mark))
    .attr('y', ({ mark, i }) => labelY(mark) + 0.5 + FLAG_LINE * (i + 0.5 - mark.lines.length / 2))
    .attr('dominant-baseline', 'central')
    .text(({ text }) => text)
}

interface Mark {
  row: Row
  column: Column
  lines: readonly string[]
}

const FLAG_LINE = 14 // px
const LABEL_FITS = 20 // px, height of a cell

/** The text of the label, in two lines if the panel is slim. */
function flagLines({ name, node }: ResidualStep, slim: boolean): string[] {
  const sublayer = name.includes(' and ') ? '' : name.replace('+ ', '’s ')
  const place = node.layer === undefined ? 'the embedding' : `L${node.layer}${sublayer}`
  return slim ? ['▲ first from', place] : [`▲ first from ${place}`]
}

// The legend is a part of the picture, so that an exported picture has it.

interface Key {
  x: number
  width: number
  kind: string
  text: string
  inside: boolean
  /** Line of the legend; 0 is the first. */
  line: number
}

export const LEGEND_HEIGHT = 34
export const LEGEND_LINE = 20
/** Fits the ranks and the kinds of lines. */
export const LEGEND_WIDTH = 940

function drawLegend(svg: Svg, keys: readonly Key[], y: number): void {
  const group = groupNamed(svg, 'legend')
  group
    .selectAll('rect')
    .data(keys.filter((key) => key.kind !== ''))
    .join('rect')
    .attr('class', (key) => `key ${key.kind}`)
    .attr('x', (key) => key.x)
    .attr('y', (key) => y + LEGEND_LINE * key.line + (key.inside ? 0 : 5))
    .attr('width', (key) => (key.inside ? key.width : 16))
    .attr('height', (key) => (key.inside ? 18 : 8))
    .attr('rx', 3)
  group
    .selectAll('text')
    .data(keys)
    .join('text')
    .attr('class', (key) => (key.inside ? `on-${key.kind}` : 'column'))
    .attr('x', (key) => (key.inside ? key.x + key.width / 2 : key.x + (key.kind ? 22 : 0)))
    .attr('y', (key) => y + LEGEND_LINE * key.line + 9.5)
    .attr('text-anchor', (key) => (key.inside ? 'middle' : 'start'))
    .attr('dominant-baseline', 'central')
    .text((key) => key.text)
}

/** The keys of the sublayers that the blocks have; mixers have attention's colour, and no arcs. */
function sublayerKeys(grid: Grid): [string, string][] {
  const { graph, position } = grid
  const has = (kind: string) =>
    [...graph.layers].some((layer) => graph.at(layer, position, kind) !== undefined)
  const mixers = has('MIXER_OUTPUT')
  const attention = !mixers || has('ATTENTION_OUTPUT') ? arcLegend(grid) : ''
  const keys: [string, string][] = [
    ['attention', [attention, mixers ? 'mixer' : ''].filter(Boolean).join(', or ')],
  ]
  if (!mixers || has('MLP_OUTPUT')) keys.push(['mlp', 'MLP'])
  return keys
}

function keysFor(grid: Grid): Key[] {
  const { slim, width } = grid.at
  const title = `rank of ${fitted(grid.graph.targets.get(grid.position)?.target.label ?? '', 14)}`
  const start = slim ? 0 : 46
  let x = start
  const keys: Key[] = [{ x, width: 0, kind: '', text: title, inside: false, line: 0 }]
  x += title.length * (slim ? 5.6 : 6.6) + 12
  const step = Math.min(60, (width - x) / BINS.length)
  BINS.forEach((text, bin) => {
    keys.push({ x, width: step - 2, kind: `bin-${bin}`, text, inside: true, line: 0 })
    x += step
  })
  x += 18
  const lines: [string, string][] = [...sublayerKeys(grid), ['residual', 'residual (width: norm)']]
  const widthOf = (text: string) => 22 + text.length * 5.6 + 16
  const together = lines.reduce((sum, [, text]) => sum + widthOf(text), 0)
  let line = x + together - 16 > width ? 1 : 0
  if (line === 1) x = start
  for (const [kind, text] of lines) {
    if (x > start && x + widthOf(text) - 16 > width) {
      line++
      x = start
    }
    keys.push({ x, width: 16, kind, text, inside: false, line })
    x += widthOf(text)
  }
  return keys
}

import { create } from 'd3-selection'
import { exportDialog } from '../browser/export'
import { HashState, oncePerFrame, type Shell, setTheme, shell, type Theme } from '../browser/shell'
import { messages, pageDescription } from '../browser/streams'
import type { TraceResponse } from '../contract'
import { annotationKey } from '../model/annotations'
import { FlowGraph } from '../model/flow_graph'
import { contributionTree } from '../model/graph_queries'
import { fitted } from '../model/tokens'
import { binOf, type Marks } from '../presentation/colours'
import {
  button,
  choice,
  element,
  promptText,
  provenanceLine,
  THEMES,
  Tooltip,
  tokenText,
} from '../presentation/elements'
import {
  drawHeatMap,
  type HeatCell,
  type HeatMap,
  heatPicture,
  rankLegend,
} from '../presentation/heatmap'
import { explained, levelNotes, rendered, targetSentence } from '../presentation/sentences'
import {
  CHARACTER,
  charactersIn,
  defineHatches,
  GUTTER,
  groupNamed,
  type Svg,
  setTabStop,
} from '../presentation/svg'
import { count, nodeSentence, probability, shortName, signed } from '../presentation/wording'
import { annotationDialog, annotationLines } from './annotating'
import { type Difference, differences, differentParts, otherIds } from './comparison_rows'
import { movedFocus, typing } from './controls'
import { WhyFigure } from './why'
import { whyScale } from './why_layout'

// The page of two traces: their figures with one scale, the differences of the parts, and the
// residual streams beside each other.

/** Shows two embedded traces. */
export async function comparisonPage(): Promise<void> {
  const graphs = [new FlowGraph(), new FlowGraph()] as const
  for (const [i, name] of SIDES.entries()) {
    for await (const message of messages<TraceResponse>(name)) graphs[i]?.feed(message)
  }
  new ComparisonView(shell(), ...graphs).draw()
  document.documentElement.dataset.ready = 'complete'
}

const SIDES = ['before', 'after'] as const
const LISTED = 10 // nodes, as in the figure of one trace
const SIDE_BY_SIDE = 1000 // px
const GAP = 36
const NARROWEST = 350

class ComparisonView {
  private readonly state = new HashState({
    sel: '',
    theme: '',
    names: pageDescription().names ?? '',
  })
  private readonly tooltip = new Tooltip()
  private readonly figures: readonly [WhyFigure, WhyFigure]
  private readonly pair = element('div', { class: 'pair' })
  private readonly parts = create('svg').attr('class', 'picture differences') as unknown as Svg
  private readonly streams = heatPicture('Residual streams of both traces')
  private readonly openAnnotation = annotationDialog({
    text: () => this.state.get('names'),
    change: (names) => this.state.set({ names }),
  })
  private readonly nameButton = button(
    'Name or note',
    'Name the selected head or neuron, or add a note to it',
    () => {
      const node = this.before.node(this.state.get('sel'))
      if (node) this.openAnnotation(node)
    },
  )
  private readonly theme = choice('Theme', THEMES, (theme) => this.state.set({ theme }))
  private readonly rows: readonly Difference[]
  /** The id in the second trace by the id in the first. */
  private readonly toAfter: (id: string) => string
  private exportWidth: number | undefined

  constructor(
    private readonly shellParts: Shell,
    private readonly before: FlowGraph,
    private readonly after: FlowGraph,
  ) {
    const { title, positions } = pageDescription()
    const ids = otherIds(positions)
    this.toAfter = ids.toAfter
    this.rows = differences(this.side(before), this.side(after), ids)
    const actions = (back: (id: string) => string) => ({
      select: (id: string) => this.state.set({ sel: back(id) }),
      pin: () => {},
    })
    this.figures = [
      new WhyFigure(before, this.tooltip, actions(String), 'Before'),
      new WhyFigure(after, this.tooltip, actions(ids.toBefore), 'After'),
    ]
    document.addEventListener('keydown', (event) => this.pressed(event))
    const draw = oncePerFrame(() => this.draw())
    this.fill(title)
    this.state.subscribe(draw)
    new ResizeObserver(draw).observe(shellParts.main)
  }

  private side(graph: FlowGraph) {
    const position = lastPosition(graph)
    return { graph, position, tree: contributionTree(graph, position, LISTED) }
  }

  /** Adds the heading, the toolbar and the panels. */
  private fill(title: string): void {
    const { header, toolbar, main, aside } = this.shellParts
    const heading = element('div', { class: 'heading comparison' })
    for (const [i, graph] of [this.before, this.after].entries()) {
      const position = lastPosition(graph)
      const target = graph.targets.get(position)?.target.label ?? ''
      const side = element('span', { class: 'quiet' }, i === 0 ? 'Before: ' : 'After: ')
      const line = element('h1', {}, side, promptText(graph.prompt, position))
      const answer = tokenText(target)
      answer.classList.add('answer')
      line.append(element('span', { class: 'arrow' }, ' → '), answer)
      const sentences = [targetSentence(graph, position) ?? [], levelNotes(graph.limited)]
      const story = sentences.flatMap((sentence) => [...rendered(sentence), ' '])
      heading.append(
        line,
        element('p', { class: 'story' }, ...story),
        provenanceLine(graph.provenance, graph.complete),
      )
    }
    header.prepend(heading)
    const layout = (width: number | undefined) => {
      this.exportWidth = width
      this.draw()
    }
    const footnotes = () => annotationLines(this.before)
    const open = exportDialog({ title, stream: 'before', layout, footnotes })
    toolbar.append(
      this.nameButton,
      this.theme,
      button('Export', 'Export the figures or the first trace', open),
    )
    this.pair.append(...this.figures.map((figure) => figure.element))
    const streams = element(
      'section',
      { class: 'overview-box' },
      element('h2', {}, 'Residual streams: top token, target’s rank and probability'),
      this.streams.node() as SVGSVGElement,
    )
    const second = element('div', { class: 'pair' }, streams)
    if (this.rows.length > 0) second.prepend(this.differencePanel())
    const note = differentParts(this.before, this.after)
    main.append(this.pair, ...(note ? [element('p', { class: 'quiet' }, note)] : []), second)
    aside.remove()
  }

  /** Arrow keys move the focus, Enter selects a part, and n names it. */
  private pressed(event: KeyboardEvent): void {
    const { target, key } = event
    if (event.ctrlKey || event.metaKey || event.altKey || typing(target)) return
    if (document.querySelector('dialog[open]')) return
    if (movedFocus(event)) event.preventDefault()
    else if (key === 'Enter' && target instanceof SVGElement)
      target.dispatchEvent(new MouseEvent('click', { bubbles: true }))
    else if (key === 'n') {
      event.preventDefault()
      this.nameButton.click()
    }
  }

  private differencePanel(): HTMLElement {
    const picture = this.parts.node() as SVGSVGElement
    picture.addEventListener('click', (event) => {
      const id = (event.target as Element).closest<SVGElement>('[data-id]')?.dataset.id
      if (id) this.state.set({ sel: id })
    })
    const [what, other] = [this.before, this.after].map((g) => explained(g, lastPosition(g)))
    const of = what === other ? what : `${what}, and to the ${other}`
    return element(
      'section',
      { class: 'overview-box' },
      element('h2', {}, `What differs: what each part adds to the ${of}`),
      element('p', { class: 'quiet' }, 'The rows add up to the logits.'),
      picture,
    )
  }

  draw(): void {
    for (const graph of [this.before, this.after]) graph.annotate(this.state.get('names'))
    const theme = this.state.get('theme')
    setTheme(theme as Theme)
    this.theme.value = theme
    const room = Math.max(NARROWEST, this.exportWidth ?? this.shellParts.main.clientWidth)
    const half = room < SIDE_BY_SIDE ? room : (room - GAP) / 2
    const trees = [this.before, this.after].flatMap(
      (graph) => contributionTree(graph, lastPosition(graph), LISTED) ?? [],
    )
    const scale = Math.min(...trees.map(whyScale))
    const selected = this.state.get('sel')
    const part = this.before.node(selected)
    this.nameButton.disabled = !part || annotationKey(part) === undefined
    for (const [i, figure] of this.figures.entries()) {
      const graph = i === 0 ? this.before : this.after
      const own = selected && i === 1 ? this.toAfter(selected) : selected
      figure.draw(half, lastPosition(graph), marksOf(own), scale)
    }
    const width = Math.min(half, WIDEST)
    drawDifferences(this.parts, this.rows, width, selected)
    // Without differences, the streams have the room of both panels.
    this.drawStreams(this.rows.length > 0 ? width : Math.min(room, WIDEST))
    for (const picture of this.shellParts.main.querySelectorAll('svg.why, svg.differences'))
      setTabStop(picture, picture.querySelector('[tabindex].selected') ?? undefined)
  }

  private drawStreams(width: number): void {
    const layers = [...new Set([...this.before.layers, ...this.after.layers])].sort((a, b) => b - a)
    const each = (width - GUTTER) / 2
    const graphs = new Map([
      ['before', this.before],
      ['after', this.after],
    ])
    const map: HeatMap = {
      columns: [...graphs].map(([key, graph], i) => ({
        key,
        label: `${key}: ${graph.targets.get(lastPosition(graph))?.target.label ?? ''}`,
        x: GUTTER + i * each,
        width: each - 8,
        labelled: true,
        selected: false,
      })),
      rows: layers.map((layer) => ({ key: String(layer), label: `L${layer}`, selected: false })),
      cellHeight: layers.length > 14 ? 18 : 26,
      width,
      cell: (row, column) => residualCell(graphs.get(column), Number(row)),
    }
    drawHeatMap(this.streams, map, rankLegend(width))
  }
}

const WIDEST = 900 // px

function lastPosition(graph: FlowGraph): number {
  return Math.max(...graph.traced)
}

function marksOf(selected: string): Marks {
  return { key: selected, selected, pinned: new Set(), found: undefined, path: undefined }
}

function residualCell(graph: FlowGraph | undefined, layer: number): HeatCell | undefined {
  const node = graph?.at(layer, lastPosition(graph), 'BLOCK_OUTPUT')
  const reading = node?.reading
  if (!graph || !node || !reading) return undefined
  const rank = reading.targetRank === undefined ? '' : `rank ${count(reading.targetRank)}`
  const p = reading.targetProbability
  return {
    id: '',
    lines: [
      { mark: '', text: reading.top[0]?.token.label ?? '', strong: reading.targetRank === 0 },
    ],
    corner: p === undefined ? rank : `${rank}, ${probability(p, reading.targetLogProbability)}`,
    paint: `bin-${binOf(node, graph)}`,
    sentence: nodeSentence(node, graph),
    selected: false,
    found: undefined,
  }
}

// The figure of the differences: two bars for each part on the left, and the difference on the
// right, with one scale.

const ROW = 34
const TOP = 24
const NAME = 150 // px, at least
const LONGEST_NAME = 0.4 // of the figure's width
const NUMBER = 52 // px beside a bar
const BAR = 11

function drawDifferences(
  svg: Svg,
  rows: readonly Difference[],
  width: number,
  selected: string,
): void {
  defineHatches(svg)
  const height = TOP + rows.length * ROW + 4
  svg.attr('width', width).attr('height', height).attr('viewBox', `0 0 ${width} ${height}`)
  svg.attr('role', 'group').attr('aria-label', 'Contributions of the parts in both traces')
  const values = rows.flatMap(({ before, after }) => [before, after])
  const changes = rows.map(({ before, after }) => after - before)
  const span = (of: readonly number[]) => [Math.min(0, ...of), Math.max(0, ...of)] as const
  const [low, high] = span(values)
  const [least, most] = span(changes)
  const longest = Math.max(...rows.map((row) => nameOf(row).length)) * CHARACTER + 12
  const name = Math.min(LONGEST_NAME * width, Math.max(NAME, longest))
  const scale = (width - name - 4 * NUMBER) / (high - low + most - least || 1)
  const zeros = {
    names: name,
    values: name + NUMBER - low * scale,
    changes: width - NUMBER - most * scale,
  }
  const bars = rows.flatMap((row, i) => barsOf(row, TOP + i * ROW, zeros))
  drawNames(svg, rows, zeros, selected)
  groupNamed(svg, 'bars')
    .selectAll('path')
    .data(bars)
    .join('path')
    .attr('class', ({ kind, value }) => `${kind} ${value < 0 ? 'subtracts' : 'adds'}`)
    .attr('d', ({ x, y, value }) => `M${x},${y}h${value * scale}v${BAR}h${-value * scale}z`)
  groupNamed(svg, 'numbers')
    .selectAll('text')
    .data(bars)
    .join('text')
    .attr('class', 'number')
    .attr('x', ({ x, value }) => x + value * scale + (value < 0 ? -4 : 4))
    .attr('y', ({ y }) => y + BAR / 2)
    .attr('dominant-baseline', 'central')
    .attr('text-anchor', ({ value }) => (value < 0 ? 'end' : 'start'))
    .text(({ value }) => signed(value))
}

interface Bar {
  kind: 'before' | 'after' | 'change'
  value: number
  x: number
  y: number
}

interface Zeros {
  /** The right edge of the names. */
  names: number
  values: number
  changes: number
}

function nameOf({ node }: Difference): string {
  return node ? shortName(node) : 'all other parts'
}

function barsOf(row: Difference, y: number, zeros: Zeros): Bar[] {
  return [
    { kind: 'before', value: row.before, x: zeros.values, y: y + 4 },
    { kind: 'after', value: row.after, x: zeros.values, y: y + 5 + BAR },
    { kind: 'change', value: row.after - row.before, x: zeros.changes, y: y + 4 + BAR / 2 },
  ]
}

function drawNames(svg: Svg, rows: readonly Difference[], zeros: Zeros, selected: string): void {
  groupNamed(svg, 'headings')
    .selectAll('text')
    .data([
      { x: 0, text: 'part' },
      { x: zeros.values, text: 'before (light), after' },
      { x: zeros.changes, text: 'change' },
    ])
    .join('text')
    .attr('class', 'column')
    .attr('x', ({ x }) => x)
    .attr('y', 14)
    .text(({ text }) => text)
  groupNamed(svg, 'names')
    .selectAll('text')
    .data(rows)
    .join('text')
    .attr('class', ({ node }) => (node && node.id === selected ? 'strong selected' : 'strong'))
    .attr('data-id', ({ node }) => node?.id ?? null)
    .attr('tabindex', ({ node }) => (node ? -1 : null))
    .attr('role', ({ node }) => (node ? 'button' : null))
    .attr('x', 0)
    .attr('y', (_, i) => TOP + i * ROW + ROW / 2)
    .attr('dominant-baseline', 'central')
    .text((row) => fitted(nameOf(row), charactersIn(zeros.names)))
}

import { create, select } from 'd3-selection'
import { ChangeTracker } from '../browser/shell'
import type { FlowGraph } from '../model/flow_graph'
import { contributionTree } from '../model/graph_queries'
import { cut, fitted } from '../model/tokens'
import { chipClass, type Marks, shownToken } from '../presentation/colours'
import { element, type Tooltip } from '../presentation/elements'
import { explained, figureName } from '../presentation/sentences'
import {
  charactersIn,
  defineHatches,
  type Group,
  groupNamed,
  type Svg,
  setClasses,
} from '../presentation/svg'
import { signed } from '../presentation/wording'
import { preview } from './inspector'
import { band, CHIP, type Ribbon, ROW } from './layer_pieces'
import { type PartRow, type SourceBox, TOP, type WhyLayout, whyLayout } from './why_layout'

// The same tree as `trace.why(at_most=10)`.
const LISTED = 10
const AMOUNT = 46 // px of a number
const TEXT = 50 // px of the title and the note

interface Actions {
  select: (id: string) => void
  pin: (id: string) => void
}

/** The figure of the parts that add most to the target's logit. */
export class WhyFigure {
  readonly element: HTMLElement
  private readonly svg = create('svg').attr('class', 'picture why') as unknown as Svg
  private readonly title = element('h2')
  private readonly note = element('p', { class: 'quiet' })
  private readonly layoutChanges = new ChangeTracker()

  constructor(
    private readonly graph: FlowGraph,
    private readonly tooltip: Tooltip,
    actions: Actions,
    private readonly side: '' | 'Before' | 'After' = '',
  ) {
    const picture = this.svg.attr('role', 'group').node() as SVGSVGElement
    this.element = element('section', { class: 'why-box' }, this.title, this.note, picture)
    picture.addEventListener('click', (event) => {
      const id = idOf(event)
      if (id) (event.ctrlKey || event.metaKey ? actions.pin : actions.select)(id)
    })
    picture.addEventListener('pointermove', (event) => this.hovered(event))
    picture.addEventListener('pointerleave', () => this.tooltip.hide())
  }

  /** Draws the figure; `scale` is the height of a logit in pixels, if another figure has the same. */
  draw(width: number, position: number, marks: Marks, scale?: number): void {
    const { graph, svg } = this
    if (this.layoutChanges.changed(width, position, graph.labels, scale ?? 0))
      this.place(width, position, scale)
    setClasses<PartRow>(svg, '.parts > g', ({ node, rest }) => {
      const classes = chipClass(node, graph, marks)
      return rest ? `${classes} rest` : classes
    })
  }

  /** The drawn height with the title and the note. */
  get height(): number {
    return TEXT + (this.svg.node()?.height.baseVal.value ?? 0)
  }

  private place(width: number, position: number, scale: number | undefined): void {
    const { graph, svg } = this
    const tree = graph.complete ? contributionTree(graph, position, LISTED) : undefined
    this.element.hidden = graph.complete && !tree
    this.element.classList.toggle('pending', !graph.complete)
    const target = graph.targets.get(position)?.target.label ?? 'the target'
    const where = this.side ? `${this.side}: where` : 'Where'
    this.title.textContent = `${where} the ${explained(graph, position)} comes from`
    this.note.textContent = tree
      ? `The largest direct contributions; with the rests they add up to ${signed(tree.contribution)}.`
      : 'Shown when the trace is complete.'
    if (!tree) return
    svg.attr('aria-label', this.title.textContent)
    const at = whyLayout(graph, tree, width, scale)
    svg.attr('width', at.width).attr('height', at.height)
    svg.attr('viewBox', `0 0 ${at.width} ${at.height}`)
    drawWhy(svg, at, figureName(graph))
    drawAnswer(svg, at, target, signed(tree.contribution))
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

function drawWhy(svg: Svg, at: WhyLayout, figure: string): void {
  defineHatches(svg)
  drawHeadings(groupNamed(svg, 'headings'), at)
  const rests = new Set(at.rows.filter(({ rest }) => rest).map(({ ribbon }) => ribbon))
  drawRibbons(groupNamed(svg, 'source-ribbons'), at.sourceRibbons, rests)
  drawRibbons(
    groupNamed(svg, 'part-ribbons'),
    at.rows.map(({ ribbon }) => ribbon),
    rests,
  )
  drawSources(groupNamed(svg, 'sources'), at)
  drawParts(groupNamed(svg, 'parts'), at, figure)
}

function drawHeadings(group: Group, { columns, sources }: WhyLayout): void {
  const text = [
    { x: 0, text: sources.length > 0 ? 'source token' : '', anchor: 'start' },
    { x: columns.name, text: 'part', anchor: 'start' },
    { x: columns.chip, text: columns.chipWidth > 0 ? 'top token' : '', anchor: 'start' },
    { x: columns.number, text: 'adds', anchor: 'end' },
  ]
  group
    .selectAll('text')
    .data(text)
    .join('text')
    .attr('class', 'column')
    .attr('x', (heading) => heading.x)
    .attr('y', 14)
    .attr('text-anchor', (heading) => heading.anchor)
    .text((heading) => heading.text)
}

function drawRibbons(group: Group, ribbons: readonly Ribbon[], rests: ReadonlySet<Ribbon>): void {
  group
    .selectAll<SVGPathElement, Ribbon>('path')
    .data(ribbons)
    .join('path')
    .attr('class', (ribbon) => {
      const sign = ribbon.share < 0 ? 'subtracts' : 'adds'
      return rests.has(ribbon) && ribbon.share >= 0 ? 'ribbon rest' : `ribbon ${sign}`
    })
    .attr('data-id', (ribbon) => ribbon.node.id)
    .attr('d', (ribbon) => band(ribbon))
}

function drawSources(group: Group, { sources, columns }: WhyLayout): void {
  group
    .selectAll<SVGGElement, SourceBox>('g')
    .data(sources)
    .join((enter) => {
      const box = enter.append('g')
      box.append('rect').attr('rx', 5).attr('height', CHIP)
      box.append('text').attr('dominant-baseline', 'central').attr('x', 6)
      return box
    })
    .attr('class', ({ position }) => (position === undefined ? 'chip rest' : 'chip bin-4'))
    .attr('transform', ({ y }) => `translate(0,${y})`)
    .each(function ({ text }) {
      const own = select(this)
      own.select('rect').attr('width', columns.sourceWidth)
      own
        .select('text')
        .attr('y', CHIP / 2 + 0.5)
        .text(text)
    })
}

function drawParts(group: Group, { rows, columns }: WhyLayout, figure: string): void {
  group
    .attr('role', 'list')
    .selectAll<SVGGElement, PartRow>('g')
    .data(rows)
    .join((enter) => {
      const row = enter.append('g').attr('role', 'listitem').attr('tabindex', -1)
      row.append('path').attr('class', 'hit')
      row.append('rect').attr('rx', 5).attr('height', CHIP)
      row.append('text').attr('class', 'name strong')
      row.append('text').attr('class', 'top')
      row.append('text').attr('class', 'amount').attr('text-anchor', 'end')
      row
        .selectAll('text')
        .attr('dominant-baseline', 'central')
        .attr('y', CHIP / 2 + 0.5)
      return row
    })
    .attr('data-id', ({ node }) => node.id)
    .attr('aria-label', (row) => `${spoken(row)} to the ${figure}`)
    .attr('transform', ({ y }) => `translate(0,${y + (ROW - CHIP) / 2})`)
    .each(function (row) {
      const own = select(this)
      const shown = row.rest || columns.chipWidth === 0 ? undefined : shownToken(row.node)
      const top = shown?.token.label ?? ''
      own.select('.hit').attr('d', `M${columns.name},0H${columns.number}V${CHIP}H${columns.name}z`)
      own.select('rect').attr('x', columns.chip).attr('width', columns.chipWidth)
      own.select('rect').attr('visibility', top ? null : 'hidden')
      own
        .select('.name')
        .attr('x', columns.name)
        .text(cut(row.name, charactersIn(nameRoom(row, columns))))
      own
        .select('.top')
        .attr('x', columns.chip + 6)
        .text(fitted(top, charactersIn(columns.chipWidth - 10)))
      own.select('.amount').attr('x', columns.number).text(signed(row.contribution))
    })
}

/** The room for a part's name; rests have a narrower font and no token. */
function nameRoom({ rest }: PartRow, columns: WhyLayout['columns']): number {
  return rest ? 1.2 * (columns.number - AMOUNT - columns.name) : columns.chip - columns.name
}

function spoken({ name, node, rest, contribution }: PartRow): string {
  const top = rest ? undefined : node.reading?.top[0]?.token.label
  const token = top === undefined ? '' : `, top ${top}`
  return `${name}${token}, adds ${signed(contribution)}`
}

/** The answer and its logit beside the stacked contributions. */
function drawAnswer(svg: Svg, at: WhyLayout, target: string, logit: string): void {
  const { columns, stack } = at
  const middle = stack.y + stack.height / 2
  const group = groupNamed(svg, 'answer-chip')
  group
    .selectAll('rect')
    .data([0, 1])
    .join('rect')
    .attr('class', (i) => (i === 0 ? 'stack' : 'bin-0'))
    .attr('x', (i) => (i === 0 ? columns.stack : columns.answer))
    .attr('y', (i) => (i === 0 ? stack.y : middle - 20))
    .attr('width', (i) => (i === 0 ? 8 : columns.answerWidth))
    .attr('height', (i) => (i === 0 ? stack.height : 40))
    .attr('rx', (i) => (i === 0 ? 2 : 7))
  group
    .selectAll('text')
    .data([fitted(target, charactersIn(columns.answerWidth - 12)), logit])
    .join('text')
    .attr('class', 'on-bin-0')
    .attr('x', columns.answer + columns.answerWidth / 2)
    .attr('y', (_, i) => Math.max(TOP, middle) - 9 + 18 * i)
    .attr('text-anchor', 'middle')
    .attr('dominant-baseline', 'central')
    .text((text) => text)
}

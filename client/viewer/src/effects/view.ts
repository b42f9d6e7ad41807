import { exportDialog } from '../browser/export'
import {
  ChangeTracker,
  HashState,
  oncePerFrame,
  revealSelected,
  type Shell,
  setTheme,
  shell,
  showSelection,
  type Theme,
} from '../browser/shell'
import {
  connectToLivePage,
  isLive,
  messages,
  pageDescription,
  reportToParent,
} from '../browser/streams'
import { finite, type InterveneResponse, number } from '../contract'
import { type Effect, Effects, type Measure } from '../model/effects'
import { isolated } from '../model/tokens'
import {
  button,
  choice,
  element,
  promptText,
  provenanceLine,
  THEMES,
  tokenText,
} from '../presentation/elements'
import {
  drawHeatMap,
  type HeatCell,
  heatPicture,
  LEGEND_LINE,
  type Legend,
} from '../presentation/heatmap'
import {
  columnsIn,
  type Direction,
  GUTTER,
  nearestInDirection,
  setTabStop,
} from '../presentation/svg'
import { count, decimals, probability, signed } from '../presentation/wording'

// The page of a sweep: a heat map of the effects of experiments on the prediction.

/** The state in a link to the page of a sweep. */
const STATE = {
  /** The selected effect as `row|column`; '' = the strongest. */
  sel: '',
  measure: '',
  theme: '',
} as const

const MEASURES = [
  ['', 'change of the logit'],
  ['log', 'change of the log-probability'],
  ['probability', 'change of the probability'],
  ['kl', 'KL divergence in nats'],
] as const

/** Shows embedded or posted effects. */
export async function effectsPage(): Promise<void> {
  const view = new EffectsView(shell(), pageDescription().title)
  connectToLivePage({ select: () => {}, theme: (theme) => view.state.set({ theme }) })
  for await (const message of messages<InterveneResponse>('effects')) view.feed(message)
  view.finish()
}

const NARROWEST = 320 // px
const STRONGEST = 10 // effects in the list
const OPAQUE = 55 // percent, at which text stays readable

class EffectsView {
  readonly state = new HashState<keyof typeof STATE>(STATE)
  private readonly effects = new Effects()
  private readonly svg = heatPicture('Effects of the experiments')
  private readonly heading = element('div', { class: 'heading' })
  private readonly title = element('h2', {})
  private readonly changes = new ChangeTracker()
  private readonly draw = oncePerFrame(() => this.redraw())
  private readonly measures = choice('Measure', MEASURES, (measure) => this.state.set({ measure }))
  private readonly theme = choice('Theme', THEMES, (theme) => this.state.set({ theme }))
  private ended = false
  private exportWidth: number | undefined

  constructor(
    private readonly parts: Shell,
    title: string,
  ) {
    const picture = this.svg.node() as SVGSVGElement
    parts.header.prepend(this.heading)
    parts.toolbar.append(
      this.measures,
      this.theme,
      button(
        'Export',
        'Export the figure or the recorded stream',
        exportDialog({ title, stream: 'effects', layout: (width) => this.layout(width) }),
      ),
    )
    parts.main.append(element('section', { class: 'overview-box panel' }, this.title, picture))
    for (const region of [picture, parts.aside]) {
      region.addEventListener('click', (event) => this.clicked(event))
    }
    picture.addEventListener('keydown', (event) => this.pressed(event))
    document.addEventListener('keydown', ({ key }) => {
      if (key === 'Escape') this.state.set({ sel: '' })
    })
    this.state.subscribe(() => this.draw())
    new ResizeObserver(() => this.draw()).observe(parts.main)
    setTheme(this.state.get('theme') as Theme)
  }

  feed(message: InterveneResponse): void {
    this.effects.feed(message)
    if (isLive()) this.draw() // a saved page has all of them at once
  }

  finish(): void {
    this.ended = true
    this.redraw()
    if (!isLive() && this.state.get('sel')) revealSelected(this.parts.main)
    document.documentElement.dataset.ready = 'complete'
  }

  private measure(): Measure {
    return (this.state.get('measure') || 'logit') as Measure
  }

  private selected(): Effect | undefined {
    const [row, column] = this.state.get('sel').split('|')
    const { effects } = this
    const chosen = effects.all.find((effect) => effect.row === row && effect.column === column)
    return chosen ?? effects.strongest(this.measure())[0]
  }

  /** Lays the map out for an export of this width; undefined = for the window. */
  private layout(width: number | undefined): void {
    this.exportWidth = width
    this.redraw()
  }

  private redraw(): void {
    const { effects, state } = this
    setTheme(state.get('theme') as Theme)
    this.theme.value = state.get('theme')
    this.measures.value = state.get('measure')
    if (effects.prompt.length === 0) return
    const width = Math.max(NARROWEST, this.exportWidth ?? this.parts.main.clientWidth)
    if (
      !this.changes.changed(
        width,
        effects.version,
        this.ended,
        ...Object.keys(STATE).map((key) => state.get(key as keyof typeof STATE)),
      )
    )
      return
    this.fillHeader()
    const chosen = this.selected()
    if (!chosen) return
    this.drawMap(width, chosen)
    this.fillInspector(chosen)
    showSelection(this.parts.aside, state.get('sel') && placeOf(chosen))
  }

  private fillHeader(): void {
    const { effects } = this
    const title = element('h1', {}, promptText(effects.prompt, effects.prompt.length - 1))
    const answer = tokenText(effects.target.label)
    answer.classList.add('answer')
    title.append(element('span', { class: 'arrow' }, ' → '), answer)
    const [first] = effects.strongest(this.measure())
    const story = element('p', { class: 'story' })
    const measured = MEASURES.find(([name]) => (name || 'logit') === this.measure())?.[1] ?? ''
    const whose = this.measure() === 'kl' ? [] : [' of ', tokenText(effects.target.label)]
    this.title.replaceChildren(measured.charAt(0).toUpperCase(), measured.slice(1), ...whose)
    if (first) {
      const value = valueText(effects.value(first, this.measure()), this.measure())
      const of = `${count(effects.all.length)} of ${count(effects.experiments)} experiments`
      story.append(`${of}. Largest ${measured}: ${value}, ${effects.name(first)}.`)
    }
    this.heading.replaceChildren(
      title,
      story,
      provenanceLine(effects.provenance, effects.complete || !this.ended),
    )
  }

  private drawMap(width: number, chosen: Effect): void {
    const { effects } = this
    const measure = this.measure()
    const names = effects.columns()
    const byPlace = new Map(effects.all.map((effect) => [placeOf(effect), effect]))
    const sizes = effects.all.map((effect) => Math.abs(finite(effects.value(effect, measure))))
    const largest = Math.max(1e-9, ...sizes)
    const rows = effects.rows()
    const places = columnsIn(names.length, names.indexOf(chosen.column), GUTTER, width - GUTTER)
    drawHeatMap(
      this.svg,
      {
        columns: places.map((place, i) => ({
          key: names[i] ?? '',
          label: effects.label(names[i] ?? ''),
          x: place.x,
          width: place.labelled ? place.width + 6 : place.width,
          labelled: place.labelled,
          selected: names[i] === chosen.column,
        })),
        rows: rows.map((row) => ({ key: row, label: row, selected: row === chosen.row })),
        cellHeight: rows.length > 14 ? 18 : 30,
        width,
        cell: (row, column) => {
          const effect = byPlace.get(`${row}|${column}`)
          return effect && this.cell(effect, largest, effect === chosen)
        },
      },
      legendOf(largest, measure, effects),
    )
    const picture = this.svg.node() as SVGSVGElement
    const current = picture.querySelector(`[data-id="${CSS.escape(placeOf(chosen))}"]`)
    setTabStop(picture, current ?? undefined)
  }

  private cell(effect: Effect, largest: number, selected: boolean): HeatCell {
    const { effects } = this
    const value = effects.value(effect, this.measure())
    return {
      id: placeOf(effect),
      lines: [
        {
          mark: '',
          text: valueText(value, this.measure()),
          strong: changesRank(effect, effects),
        },
      ],
      corner: '',
      paint: paintOf(value, largest),
      sentence: `${effects.name(effect)}, rank ${effect.after.targetRank ?? 0}`,
      selected,
      found: undefined,
    }
  }

  private fillInspector(chosen: Effect): void {
    const { effects } = this
    const measure = this.measure()
    const links = effects
      .strongest(measure)
      .slice(0, STRONGEST)
      .map((effect) =>
        element(
          'button',
          { type: 'button', class: 'node-link', 'data-id': placeOf(effect) },
          element('span', { class: 'what' }, effects.name(effect)),
          element('span', { class: 'number' }, valueText(effects.value(effect, measure), measure)),
        ),
      )
    const facts = element(
      'section',
      { class: 'facts', 'data-node': placeOf(chosen) },
      element('h2', {}, effects.name(chosen)),
      figures(effects, chosen),
    )
    const actions = element('p', { class: 'effect-actions' })
    if (isLive()) {
      const { layer, head, position } = chosen.coordinates
      actions.append(
        button('Trace without it', 'Trace the pass without this part', () =>
          reportToParent({ removed: { view: 'trace', layer, head, position } }),
        ),
        ' ',
        button('Generate without it', 'Let the model continue with and without this part', () =>
          reportToParent({ removed: { view: 'generation', layer, head, position } }),
        ),
      )
    }
    facts.append(actions, predictions(effects, chosen))
    this.parts.aside.replaceChildren(
      facts,
      element('section', { class: 'node-links' }, element('h3', {}, 'Largest effects'), ...links),
    )
  }

  private clicked(event: Event): void {
    const id = (event.target as Element).closest<HTMLElement>('[data-id]')?.dataset.id
    if (id !== undefined) this.select(id)
  }

  private pressed(event: KeyboardEvent): void {
    const from = event.target
    if (!(from instanceof SVGElement)) return
    if (event.key.startsWith('Arrow')) {
      event.preventDefault()
      nearestInDirection(this.svg.node() as Element, from, event.key as Direction)?.focus()
    } else if (event.key === 'Enter' && from.dataset.id) this.select(from.dataset.id)
  }

  private select(id: string): void {
    this.state.set({ sel: id })
    const chosen = this.selected()
    if (chosen) this.parts.live.textContent = this.effects.name(chosen)
  }
}

function placeOf({ row, column }: Effect): string {
  return `${row}|${column}`
}

function valueText(value: number, measure: Measure): string {
  return measure === 'kl' ? decimals(value, 3) : signed(value, measure === 'probability' ? 3 : 2)
}

/** Decreases and increases in two colours, stronger for larger changes. */
function paintOf(value: number, largest: number) {
  const share = Math.round((OPAQUE * Math.abs(finite(value))) / largest)
  const colour = value < 0 ? '--subtracts' : '--head-adds'
  return { fill: `color-mix(in srgb, var(${colour}) ${share}%, var(--paper))`, ink: 'var(--ink)' }
}

function changesRank({ after }: Effect, { before }: Effects): boolean {
  return after.targetRank !== before.targetRank
}

function legendOf(largest: number, measure: Measure, effects: Effects): Legend {
  const values =
    measure === 'kl' ? [0, largest / 2, largest] : [-largest, -largest / 2, 0, largest / 2, largest]
  const bold = effects.all.some((effect) => changesRank(effect, effects))
    ? `bold: the rank of ${isolated(effects.target.label)} changes`
    : ''
  return {
    key: `${largest} ${measure} ${bold}`,
    lines: bold ? 2 : 1,
    draw: (group) => {
      group
        .selectAll('rect')
        .data(values)
        .join('rect')
        .attr('x', (_, i) => i * 66)
        .attr('width', 64)
        .attr('height', 18)
        .attr('rx', 3)
        .attr('class', 'effect-key')
        .style('fill', (value) => paintOf(value, largest).fill)
      group
        .selectAll('text.value')
        .data(values)
        .join('text')
        .attr('class', 'value')
        .attr('x', (_, i) => i * 66 + 32)
        .attr('y', 9.5)
        .attr('text-anchor', 'middle')
        .attr('dominant-baseline', 'central')
        .text((value) => valueText(value, measure))
      group
        .selectAll('text.column')
        .data(bold ? [bold] : [])
        .join('text')
        .attr('class', 'column')
        .attr('y', 18 + LEGEND_LINE)
        .text((text) => text)
    },
  }
}

function figures(effects: Effects, { after }: Effect): HTMLElement {
  const { before } = effects
  const pair = (format: (value: number) => string, was: number, is: number) =>
    `${format(was)} → ${format(is)}`
  const rows: [string, string][] = [
    ['logit', pair((v) => signed(v), number(before.targetLogit), number(after.targetLogit))],
    [
      'probability',
      pair(probability, number(before.targetProbability), number(after.targetProbability)),
    ],
    ['rank', pair(count, before.targetRank ?? 0, after.targetRank ?? 0)],
    ['KL', `${decimals(number(after.klNats), 3)} nats`],
  ]
  return element(
    'dl',
    { class: 'measures' },
    ...rows.map(([name, value]) =>
      element('div', {}, element('dt', {}, name), element('dd', {}, value)),
    ),
  )
}

/** The most likely tokens of the changed pass. */
function predictions(effects: Effects, { after }: Effect): HTMLElement {
  const rows = (after.topTokenIds ?? []).map((id, i) => {
    const p = number(after.topProbabilities?.[i])
    const bar = element('span', { class: 'bar' })
    bar.style.setProperty('--share', String(finite(p)))
    return element(
      'tr',
      id === effects.target.id ? { class: 'target' } : {},
      element('th', { scope: 'row' }, tokenText(effects.tokens.get(id).label)),
      element('td', { class: 'bar-cell' }, bar),
      element('td', {}, probability(p)),
    )
  })
  return element(
    'table',
    { class: 'scored' },
    element('caption', {}, 'Prediction without it'),
    element('tbody', {}, ...rows),
  )
}

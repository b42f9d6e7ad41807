import {
  ChangeTracker,
  HashState,
  oncePerFrame,
  type Shell,
  setTheme,
  shell,
  type Theme,
} from '../browser/shell'
import {
  connectToLivePage,
  isLive,
  messages,
  reportToParent,
  streamNames,
} from '../browser/streams'
import type { GenerateResponse } from '../contract'
import { decidedAt, type GeneratedToken, Generation, type LayerOutcome } from '../model/generation'
import { BINS, normPaint, rankBin } from '../presentation/colours'
import {
  choice,
  element,
  provenanceLine,
  THEMES,
  Tooltip,
  tokenText,
} from '../presentation/elements'
import { count, measure, probability, signed } from '../presentation/wording'

// The page of a generation: the tokens as they are made, each above a strip of layers.

/** The state in a link to the page of a generation. */
const STATE = {
  /** The selected token as `answer.number`; '' = none. */
  sel: '',
  /** Colour of the strips: the token's rank ('') or its probability (`p`). */
  colour: '',
  theme: '',
} as const

/** The name of a stream, and what differs from the first generation. */
export interface Variant {
  stream: string
  title: string
}

const FIRST: Variant = { stream: 'generation', title: 'Answer' }
const VARIANT = 'generation:'

/** Shows embedded or posted generations. */
export async function generationPage(): Promise<void> {
  const view = new GenerationView(shell())
  connectToLivePage({ select: () => {}, theme: (theme) => view.state.set({ theme }) })
  const done = view.replay(FIRST)
  if (isLive()) {
    for await (const variant of messages<Variant>('variants')) void view.replay(variant)
    return
  }
  const others = streamNames().filter((name) => name.startsWith(VARIANT))
  const variants = others.map((stream) => ({ stream, title: stream.slice(VARIANT.length) }))
  await Promise.all([done, ...variants.map((variant) => view.replay(variant))])
  document.documentElement.dataset.ready = 'complete'
}

const STRIP = 120 // px; the strips of deep models are not higher
const CELL = 14 // px; the cells of shallow models are not higher

/** One generation on the page. */
interface Answer {
  generation: Generation
  variant: Variant
  ended: boolean
  section: HTMLElement
  heading: HTMLElement
  tokens: HTMLElement
}

export class GenerationView {
  readonly state = new HashState(STATE)
  private readonly answers: Answer[] = []
  private readonly heading = element('div', { class: 'heading' })
  private readonly side = element('div', { class: 'said-answers' })
  private readonly tooltip = new Tooltip()
  private readonly changes = new ChangeTracker()
  private readonly legend = element('p', { class: 'said-legend' })
  private readonly draw = oncePerFrame(() => this.redraw())
  private readonly colour = choice(
    'Colour of the layers',
    [
      ['', 'rank of the token'],
      ['p', 'probability of the token'],
    ],
    (colour) => this.state.set({ colour }),
  )
  private readonly theme = choice('Theme', THEMES, (theme) => this.state.set({ theme }))

  constructor(private readonly parts: Shell) {
    parts.header.prepend(this.heading)
    const order = element('span', { class: 'quiet' }, 'first layer at the bottom')
    const label = element('label', {}, 'Layers by ', this.colour)
    parts.toolbar.append(label, this.legend, order, this.theme)
    parts.main.append(this.side)
    parts.main.addEventListener('click', (event) => this.clicked(event))
    parts.main.addEventListener('keydown', (event) => this.moved(event))
    parts.main.addEventListener('pointermove', (event) => this.hovered(event))
    parts.main.addEventListener('pointerleave', () => this.tooltip.hide())
    this.state.subscribe(() => this.draw())
    setTheme(this.state.get('theme') as Theme)
  }

  /** Adds an answer and shows the messages of its stream. */
  async replay(variant: Variant): Promise<void> {
    const answer = newAnswer(variant)
    this.answers.push(answer)
    this.side.append(answer.section)
    this.draw()
    for await (const message of messages<GenerateResponse>(variant.stream)) {
      answer.generation.feed(message)
      this.draw()
    }
    answer.ended = true
    this.draw()
  }

  private redraw(): void {
    const { state } = this
    setTheme(state.get('theme') as Theme)
    this.theme.value = state.get('theme')
    this.colour.value = state.get('colour')
    const byProbability = state.get('colour') === 'p'
    if (this.changes.changed(byProbability)) this.legend.replaceChildren(...legend(byProbability))
    const [first] = this.answers
    if (first) this.fillHeader(first)
    this.answers.forEach((answer, a) => {
      this.fillAnswer(answer, a, byProbability)
    })
    this.fillInspector()
    document.documentElement.dataset.tokens = String(first?.generation.generated.length ?? 0)
  }

  private fillHeader({ generation, ended }: Answer): void {
    if (generation.prompt.length === 0) return
    const chat = generation.inMessage.includes(true)
    const shown = generation.prompt.slice(-PROMPT).map((token, i) => {
      const made = tokenText(token.label.replace(/^␣/, ' ').replaceAll('⏎', '⏎ '))
      const own = generation.inMessage[Math.max(0, generation.prompt.length - PROMPT) + i]
      if (chat && !own) made.classList.add('template')
      return made
    })
    const cut = generation.prompt.length > PROMPT ? ['… '] : []
    this.heading.replaceChildren(
      element('h1', {}, ...cut, ...shown),
      provenanceLine(generation.provenance, !ended || generation.finishReason !== ''),
    )
  }

  private fillAnswer(answer: Answer, a: number, byProbability: boolean): void {
    const { generation, tokens } = answer
    const first = a > 0 ? this.answers[0] : undefined
    const differs = first && differsFrom(answer, first)
    answer.heading.replaceChildren(answer.variant.title, ' ', headline(answer, differs, first))
    generation.generated.forEach((made, k) => {
      const button =
        (tokens.children[k] as HTMLElement) ?? tokens.appendChild(tokenButton(made, a, k))
      const selected = this.state.get('sel') === `${a}.${k}`
      button.setAttribute('aria-pressed', String(selected))
      button.tabIndex = selected || (k === 0 && !this.state.get('sel').startsWith(`${a}.`)) ? 0 : -1
      button.classList.toggle('differs', differs !== undefined && k >= differs)
      const strip = button.querySelector<HTMLElement>('.strip')
      if (strip && strip.dataset.colour !== String(byProbability)) paint(strip, made, byProbability)
    })
  }

  private chosen(): { answer: Answer; made: GeneratedToken; k: number } | undefined {
    const [a, k] = this.state.get('sel').split('.').map(Number)
    const answer = this.answers[a ?? -1]
    const made = answer?.generation.generated[k ?? -1]
    return answer && made && k !== undefined ? { answer, made, k } : undefined
  }

  private fillInspector(): void {
    const chosen = this.chosen()
    if (!this.changes.changed('inspector', this.state.get('sel'), chosen !== undefined)) return
    const hint = isLive()
      ? 'Click a token to trace the pass that predicts it.'
      : 'Click a token to see what each layer predicts.'
    const content = chosen
      ? tokenFacts(chosen.made, chosen.k, chosen.answer)
      : [element('p', { class: 'quiet' }, hint)]
    this.parts.aside.replaceChildren(...content)
  }

  private clicked(event: Event): void {
    const id = (event.target as Element).closest<HTMLElement>('[data-token]')?.dataset.token
    if (id === undefined) return
    this.state.set({ sel: id })
    const chosen = this.chosen()
    if (!chosen) return
    const { generation } = chosen.answer
    const changed = chosen.answer !== this.answers[0]
    const { made, k } = chosen
    const [ids, text] = [generation.idsBefore(k), generation.textBefore(k)]
    reportToParent({ generated: { ids, text, token: made.token, changed } })
    this.parts.live.textContent = `${made.token.label}, ${probability(Math.exp(made.logProbability))}`
  }

  private moved(event: KeyboardEvent): void {
    const from = (event.target as Element).closest<HTMLElement>('[data-token]')
    const next = from && neighbour(from, event.key)
    if (!next) return
    event.preventDefault()
    from.tabIndex = -1
    next.tabIndex = 0
    next.focus()
  }

  private hovered(event: PointerEvent): void {
    const strip = (event.target as Element).closest<HTMLElement>('.strip')
    const id = strip?.closest<HTMLElement>('[data-token]')?.dataset.token
    const [a, k] = (id ?? '').split('.').map(Number)
    const made = this.answers[a ?? -1]?.generation.generated[k ?? -1]
    if (!strip || !made) {
      this.tooltip.hide()
      return
    }
    const { bottom, height } = strip.getBoundingClientRect()
    const place = Math.floor(((bottom - event.clientY) / height) * made.layers.length)
    const read = made.layers[Math.max(0, Math.min(made.layers.length - 1, place))]
    if (read) this.tooltip.show(layerTip(made, read), event.clientX, event.clientY)
  }
}

const PROMPT = 60 // tokens shown of a long prompt

function newAnswer(variant: Variant): Answer {
  const heading = element('h2', {})
  const tokens = element('div', { class: 'said', role: 'group', 'aria-label': 'Generated tokens' })
  const section = element('section', { class: 'said-answer' }, heading, tokens)
  return { generation: new Generation(), variant, ended: false, section, heading, tokens }
}

/** The number of the first token that differs; an answer that ends earlier differs at its end. */
function differsFrom({ generation, ended }: Answer, first: Answer): number | undefined {
  const made = generation.generated.length
  const shorter = ended && first.ended && made < first.generation.generated.length
  return generation.differsFrom(first.generation) ?? (shorter ? made : undefined)
}

/** How many tokens there are, why they ended, and where they first differ. */
function headline(
  { generation, ended }: Answer,
  differs: number | undefined,
  first: Answer | undefined,
): HTMLElement {
  const made = generation.generated.length
  const parts = [`${count(made)} ${made === 1 ? 'token' : 'tokens'}`]
  parts.push(ENDS[generation.finishReason] ?? (ended ? 'stopped' : 'being generated …'))
  if (first && made > 0) {
    const same = ended && first.ended ? 'the same text' : 'the same text so far'
    parts.push(differs === undefined ? same : `differs from token ${differs} on`)
  }
  return element('span', { class: 'quiet' }, parts.join(' · '))
}

const ENDS: Record<string, string> = {
  end_of_sequence: 'ended by the model',
  stop_text: 'ended at the stop text',
  max_new_tokens: 'ended at the maximum number of tokens',
  max_positions: 'ended because the context is full',
}

function tokenButton(made: GeneratedToken, a: number, k: number): HTMLElement {
  const decided = decidedAt(made)
  const strip = element('span', { class: 'strip' })
  strip.style.height = `${Math.min(STRIP, made.layers.length * CELL)}px`
  const layer = decided === undefined ? '' : `L${decided}`
  const from = decided === undefined ? '' : `, predicted from layer ${decided} on`
  return element(
    'button',
    {
      type: 'button',
      class: 'said-token',
      'data-token': `${a}.${k}`,
      'aria-label': `${made.token.label}, token ${k}${from}`,
    },
    tokenText(made.token.label),
    strip,
    element('span', { class: 'decided' }, layer),
  )
}

/** Colours a strip, first layer at the bottom. */
function paint(strip: HTMLElement, { layers }: GeneratedToken, byProbability: boolean): void {
  const share = 100 / Math.max(1, layers.length)
  const stops = layers.map(({ rank, probability: p }, i) => {
    const colour = byProbability ? normPaint(p, 1).fill : `var(--bin-${rankBin(rank, undefined)})`
    return `${colour} ${i * share}% ${(i + 1) * share}%`
  })
  strip.style.background = stops.length > 0 ? `linear-gradient(to top, ${stops.join(', ')})` : ''
  strip.dataset.colour = String(byProbability)
}

function legend(byProbability: boolean): HTMLElement[] {
  const key = (text: string, colour: string, ink: string) => {
    const made = element('span', { class: 'key' }, text)
    made.style.background = colour
    made.style.color = ink
    return made
  }
  if (!byProbability) {
    return BINS.slice(0, 5).map((text, bin) => key(text, `var(--bin-${bin})`, `var(--on-${bin})`))
  }
  return [0, 0.1, 0.25, 0.5, 1].map((p) => {
    const { fill, ink } = normPaint(p, 1)
    return key(String(p), fill, ink)
  })
}

function layerTip(made: GeneratedToken, read: LayerOutcome): Node[] {
  return [
    element('h2', {}, tokenText(made.token.label)),
    element(
      'p',
      {},
      `after layer ${read.layer}: rank ${count(read.rank)}, ${probability(read.probability)}`,
    ),
    element('p', { class: 'tops' }, 'predicts ', ...read.top.map(({ label }) => tokenText(label))),
  ]
}

function neighbour(from: HTMLElement, key: string): HTMLElement | undefined {
  const siblings = [...(from.parentElement?.children ?? [])] as HTMLElement[]
  const at = siblings.indexOf(from)
  const steps: Record<string, number> = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0 }
  return siblings[key === 'End' ? siblings.length - 1 : (steps[key] ?? -1)]
}

/** The figures of a token, its alternatives, and what each layer predicts. */
function tokenFacts(made: GeneratedToken, k: number, { generation }: Answer): HTMLElement[] {
  const decided = decidedAt(made)
  const figures: [string, string][] = [
    ['probability', probability(Math.exp(made.logProbability))],
    ['log-probability', signed(made.logProbability, 3)],
    ['entropy', `${measure(made.entropyBits)} bits`],
    ['predicted from', decided === undefined ? 'no layer on' : `layer ${decided} on`],
  ]
  const layers = [...made.layers]
    .reverse()
    .map((read) =>
      element(
        'tr',
        read.rank === 0 ? { class: 'target' } : {},
        element('th', { scope: 'row' }, `L${read.layer}`),
        element('td', {}, count(read.rank)),
        element('td', {}, probability(read.probability)),
        element('td', {}, ...read.top.slice(0, 1).map(({ label }) => tokenText(label))),
      ),
    )
  const facts = element(
    'section',
    { class: 'facts', 'data-node': String(k) },
    element('h2', {}, tokenText(made.token.label)),
    element('p', { class: 'where' }, `token ${k} of ${generation.generated.length}`),
    element(
      'dl',
      { class: 'measures' },
      ...figures.map(([name, value]) =>
        element('div', {}, element('dt', {}, name), element('dd', {}, value)),
      ),
    ),
    alternatives(made),
    element(
      'table',
      { class: 'scored layers' },
      element('caption', {}, 'After each layer'),
      element(
        'thead',
        {},
        element(
          'tr',
          {},
          ...['layer', 'rank', 'probability', 'predicts'].map((name) =>
            element('th', { scope: 'col' }, name),
          ),
        ),
      ),
      element('tbody', {}, ...layers),
    ),
  )
  return [facts]
}

function alternatives({ top, token }: GeneratedToken): HTMLElement {
  const rows = top.map((one) => {
    const bar = element('span', { class: 'bar' })
    bar.style.setProperty('--share', String(one.probability))
    return element(
      'tr',
      one.token.id === token.id ? { class: 'target' } : {},
      element('th', { scope: 'row' }, tokenText(one.token.label)),
      element('td', { class: 'bar-cell' }, bar),
      element('td', {}, probability(one.probability)),
    )
  })
  return element(
    'table',
    { class: 'scored' },
    element('caption', {}, 'Most likely tokens'),
    element('tbody', {}, ...rows),
  )
}

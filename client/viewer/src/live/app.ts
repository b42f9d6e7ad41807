import { ChangeTracker, HashState, setTheme, type Theme } from '../browser/shell'
import { everywhere } from '../model/knock_out'
import { button, choice, element, THEMES } from '../presentation/elements'
import { CallError, callOnce, keepToken } from './calls'
import { Examples } from './examples'
import { Form } from './form'
import { History } from './history'
import { addEdits, Panel, type PanelActions } from './panel'
import {
  chatOf,
  InvalidQuestion,
  messagesOf,
  QUESTION,
  type Question,
  sameInput,
  titleOf,
  VIEWS,
  viewOf,
  withTarget,
} from './question'

interface ModelMessage {
  name?: string
  state?: string
  stateReason?: string
  nLayers?: number
  /** From 0 to 1; 0 also if the progress is not known. */
  loadedFraction?: number
}

/** Sends requests to a server and shows the results side by side as they arrive. */
export async function livePage(): Promise<void> {
  keepToken()
  const page = new LivePage()
  await page.listModels()
  page.begin()
}

/** `names` are the names and notes of heads and neurons of the question's model. */
const STATE = { theme: '', names: '', ...QUESTION } as const
const FIELDS = Object.keys(QUESTION) as (keyof Question)[]
const READY = 'STATE_READY'
const LOADING = 'STATE_LOADING'
// ms between lists of the models: while one is loading, or the server is unavailable, from the
// first to the second, each wait twice as long as the one before; at other times the last.
const REFRESH = { first: 1000, slowest: 8000, idle: 30_000 }

/** The fields that say which tokens a question is about. */
function inputFields({ model, prompt, chat, ids }: Question): Partial<Question> {
  return { model, prompt, chat, ids }
}

/**
 * Where a question comes from, and where its panel goes: after another one, or instead of another
 * one; otherwise it is the last.
 */
interface Place {
  /** The panel that asks; it shows why the question cannot be sent. */
  from?: Panel | undefined
  after?: Panel | undefined
  instead?: Panel | undefined
}

class LivePage {
  private readonly state = new HashState<keyof typeof STATE>(STATE)
  private readonly models = new Map<string, ModelMessage>()
  /** Names and notes of heads and neurons by model. */
  private readonly names = new Map<string, string>()
  private readonly panels: Panel[] = []
  private readonly answers = element('main', { class: 'answers' })
  private readonly error = element('p', { class: 'error', role: 'alert' })
  private readonly listed = new ChangeTracker()
  /** Whether the error is that of the last list of the models. */
  private listFailed = false
  private refresh = 0
  private wait = REFRESH.first / 2
  private readonly current = new CurrentResult()
  private readonly examples = new Examples((question) => this.ask(question))
  private readonly history = new History((question) => this.ask(question))
  private readonly form = new Form({ ask: (question) => this.ask(question) })
  private readonly actions: PanelActions = {
    selectionMoved: (from, place) => {
      for (const panel of this.panels) {
        if (panel !== from && sameInput(panel.question, from.question))
          panel.frame.post({ select: place })
      }
    },
    beside: (panel, other) => {
      const { view, question } = panel
      const { ids, target, targetId } = question
      const asked = { ...this.form.question(other), ...inputFields(question) }
      // The target of a chosen token belongs to its ids; otherwise the form has the newer one.
      const kept = ids !== '' || view === 'gradient' ? { target, targetId } : {}
      this.ask({ ...asked, ...kept }, { from: panel })
    },
    targetChosen: (from, target) => {
      if (!target.text.includes('\ufffd')) this.form.setTarget(target.text)
      this.open(withTarget(from.question, target), { after: from })
    },
    generatedChosen: (from, { ids, text, token, changed }) => {
      const { model, layers, heads, lens } = from.question
      const asked = { ...QUESTION, ask: 'trace', model, prompt: text, ids: ids.join(',') }
      const without = changed ? from.question.without : ''
      const question = withTarget({ ...asked, layers, heads, lens, without }, token)
      from.follower = this.open(question, { after: from, instead: from.follower })
    },
    continued: ({ question }, text) => {
      const messages = messagesOf(question)
      const last = messages.at(-1)
      if (!last) {
        this.form.show({ ...question, prompt: question.prompt + text })
        return
      }
      if (last.role === 'assistant') last.content += text
      else messages.push({ role: 'assistant', content: text })
      this.form.show({ ...question, chat: chatOf([...messages, { role: 'user', content: '' }]) })
    },
    removed: (from, view, part) => {
      if (view === 'trace') {
        this.ask({ ...from.question, ask: 'trace', without: part, sweep: '' }, { from })
        return
      }
      // The trace of a generated token belongs to the generation beside it, which is repeated.
      const generation = this.panels.find(({ follower }) => follower === from)
      const { question } = generation ?? from
      const asked = { ...this.form.question(view), ...inputFields(question) }
      const { tokens, temperature, seed, stop } = generation ? question : asked
      const sampling = { tokens, temperature, seed, stop }
      this.ask({ ...asked, ...sampling, target: '', without: everywhere(part) }, { from })
    },
    sweptOver: (from, sweep) => this.ask({ ...from.question, sweep }, { from, instead: from }),
    namesChanged: ({ question }, names) => {
      this.names.set(question.model, names)
      this.state.set({ names })
      for (const panel of this.panels)
        if (panel.question.model === question.model) panel.useNames(names)
    },
    progressed: (panel) => this.current.follow(panel),
    closed: (panel) => this.forget(panel),
  }

  constructor() {
    const header = element('header', { class: 'page-header live' })
    const theme = choice('Theme', THEMES, (value) => this.state.set({ theme: value }))
    const side = element('div', { class: 'header-side' }, theme, this.history.element)
    header.append(element('h1', {}, 'Januslens'), this.form.element, side)
    this.form.status.append(this.current.element, this.error)
    document.body.append(header, this.examples.element, this.answers)
    const applyTheme = () => {
      theme.value = this.theme()
      setTheme(this.theme())
      for (const panel of this.panels) panel.frame.post({ theme: this.theme() })
    }
    document.addEventListener('visibilitychange', () => {
      if (!document.hidden) void this.listModels()
    })
    this.state.subscribe(applyTheme)
    applyTheme()
  }

  private theme(): Theme {
    return this.state.get('theme') as Theme
  }

  /** Shows the question of the page's address, and asks it. */
  begin(): void {
    const question = Object.fromEntries(FIELDS.map((field) => [field, this.state.get(field)]))
    this.names.set(question.model || this.form.model.value, this.state.get('names'))
    if (viewOf(question as Question)) this.ask(question as Question)
  }

  /** Lists the models, and again later: soon while one is loading or the server is unavailable. */
  async listModels(): Promise<void> {
    try {
      const { models = [] } = await callOnce<{ models?: ModelMessage[] }>('ListModels', {})
      if (this.listFailed) this.error.textContent = ''
      this.listFailed = false
      this.models.clear()
      for (const model of models) this.models.set(model.name ?? '', model)
      if (this.listed.changed(JSON.stringify(models))) this.showModels(models)
      this.listModelsLater(models.some(({ state }) => state === LOADING))
    } catch (error) {
      if (!(error instanceof CallError)) throw error
      this.error.textContent = error.message
      this.listFailed = true
      this.listModelsLater(error.details.code === 'UNAVAILABLE')
    }
  }

  private listModelsLater(soon: boolean): void {
    clearTimeout(this.refresh)
    this.wait = soon ? Math.min(2 * this.wait, REFRESH.slowest) : REFRESH.first / 2
    this.refresh = window.setTimeout(
      () => {
        // Nobody sees the list of a hidden tab; returning to it lists the models again.
        if (!document.hidden) void this.listModels()
      },
      soon ? this.wait : REFRESH.idle,
    )
  }

  private showModels(models: readonly ModelMessage[]): void {
    const { model } = this.form
    const chosen = model.value || this.state.get('model')
    model.replaceChildren(
      ...models.map((model) => {
        const { name = '', state } = model
        const option = element('option', { value: name }, modelText(model))
        option.disabled = state !== READY
        return option
      }),
    )
    const ready = models.filter(({ state }) => state === READY)
    const kept = ready.find(({ name }) => name === chosen) ?? ready[0]
    model.value = kept?.name ?? ''
  }

  /** Asks a question, and keeps it in the form, in the address and in the history. */
  private ask(asked: Question, place: Place = {}): void {
    const question = { ...asked, model: asked.model || this.form.model.value }
    const view = viewOf(question)
    if (!view) return
    try {
      this.error.textContent = ''
      VIEWS[view].request(question) // throws if the question cannot be sent
      if (question.ids === '') this.form.show(question)
      this.state.set({ ...question, names: this.names.get(question.model) ?? '' })
      this.history.add(question)
      this.open(question, place)
    } catch (error) {
      if (!(error instanceof InvalidQuestion)) throw error
      if (place.from) place.from.refuse(error.message)
      else this.error.textContent = error.message
    }
  }

  /** Sends a request; its panel comes first, after another one, or instead of another one. */
  private open(question: Question, place: Place = {}): Panel {
    const view = viewOf(question) ?? 'trace'
    const panel = new Panel(view, question, this.actions)
    panel.frame.post({ theme: this.theme() })
    panel.useNames(this.names.get(question.model) ?? '')
    this.panels.push(panel)
    this.examples.element.hidden = true
    const layers = this.models.get(question.model)?.nLayers ?? 1
    if (view === 'gradient') addEdits(panel, layers, () => this.form.probePrompts())
    if (place.instead?.element.isConnected) {
      place.instead.stop()
      place.instead.element.replaceWith(panel.element)
      this.forget(place.instead)
    } else if (place.after) place.after.element.after(panel.element)
    else this.answers.append(panel.element)
    panel.element.scrollIntoView({ block: 'nearest' })
    void panel.run()
    return panel
  }

  private forget(panel: Panel): void {
    this.panels.splice(this.panels.indexOf(panel), 1)
    this.current.forget(panel)
  }
}

/** The model's name, and its state unless it is READY: `gemma (loading, 42 %)`. */
function modelText({ name = '', state = '', loadedFraction = 0 }: ModelMessage): string {
  if (state === READY) return name
  if (state !== LOADING) return `${name} (${state.replace('STATE_', '').toLowerCase()})`
  if (loadedFraction >= 1) return `${name} (checking)`
  const progress = loadedFraction > 0 ? `, ${Math.floor(100 * loadedFraction)} %` : ''
  return `${name} (loading${progress})`
}

/** The progress of the newest result beside the question, with a button that stops it. */
class CurrentResult {
  readonly element = element('p', { class: 'current' })
  private readonly text = element('span', {})
  private readonly stop = button('Cancel', 'Stop the computation of the newest result', () =>
    this.panel?.stop(),
  )
  private panel: Panel | undefined

  constructor() {
    this.element.append(this.text, this.stop)
    this.element.hidden = true
  }

  /** Shows the progress of a panel, unless a newer one is shown. */
  follow(panel: Panel): void {
    if (panel.state === 'waiting') this.panel = panel
    if (panel !== this.panel) return
    const running = panel.state === 'waiting' || panel.state === 'running'
    this.element.hidden = false
    this.element.dataset.state = panel.state
    this.text.textContent = `${titleOf(panel.question)}: ${panel.progress}`
    this.stop.disabled = !running // not hidden, so that the page below does not move
  }

  forget(panel: Panel): void {
    if (panel === this.panel) this.element.hidden = true
  }
}

import { HashState, setTheme, type Theme } from '../browser/shell'
import { button, choice, element, THEMES } from '../presentation/elements'
import { CallError, callOnce, keepToken, type Question } from './calls'
import { addEdits, Panel, type PanelActions } from './panel'

interface ModelMessage {
  name?: string
  state?: string
  stateReason?: string
  nLayers?: number
}

/** Sends requests to a server and shows the results side by side as they arrive. */
export async function livePage(): Promise<void> {
  keepToken()
  const page = new LivePage()
  await page.listModels()
}

class LivePage {
  private readonly state = new HashState({ theme: '' })
  private readonly models = new Map<string, ModelMessage>()
  private readonly panels: Panel[] = []
  private readonly answers = element('main', { class: 'answers' })
  private readonly error = element('p', { class: 'error', role: 'alert' })
  private readonly form = new Form({
    trace: (question) => this.open('trace', question),
    gradient: (question) => this.open('gradient', question),
  })
  private readonly actions: PanelActions = {
    selectionMoved: (from, place) => {
      for (const panel of this.panels) {
        if (panel !== from && samePrompt(panel.question, from.question))
          panel.frame.post({ select: place })
      }
    },
    compare: ({ view, question }) =>
      this.open(view === 'trace' ? 'gradient' : 'trace', {
        ...this.form.question(),
        ...samePromptAs(question),
      }),
    targetChosen: (from, target) => {
      if (!target.text.includes('\ufffd')) this.form.setTarget(target.text)
      const question = { ...from.question, target: target.text, clickedTarget: target }
      this.open(from.view, question, from)
    },
    closed: (panel) => {
      this.panels.splice(this.panels.indexOf(panel), 1)
    },
  }

  constructor() {
    const header = element('header', { class: 'page-header live' })
    const theme = choice('Theme', THEMES, (value) => this.state.set({ theme: value }))
    header.append(element('h1', {}, 'Januslens'), this.form.element, theme, this.error)
    document.body.append(header, this.answers)
    const applyTheme = () => {
      theme.value = this.theme()
      setTheme(this.theme())
      for (const panel of this.panels) panel.frame.post({ theme: this.theme() })
    }
    this.state.subscribe(applyTheme)
    applyTheme()
  }

  private theme(): Theme {
    return this.state.get('theme') as Theme
  }

  async listModels(): Promise<void> {
    try {
      const { models = [] } = await callOnce<{ models?: ModelMessage[] }>('ListModels', {})
      for (const model of models) this.models.set(model.name ?? '', model)
      this.form.model.replaceChildren(
        ...models.map(({ name = '', state = '' }) => {
          const ready = state === 'STATE_READY'
          const text = ready ? name : `${name} (${state.replace('STATE_', '').toLowerCase()})`
          const option = element('option', { value: name }, text)
          option.disabled = !ready
          return option
        }),
      )
      const ready = models.find(({ state }) => state === 'STATE_READY')
      this.form.model.value = ready?.name ?? ''
    } catch (error) {
      if (!(error instanceof CallError)) throw error
      this.error.textContent = error.message
    }
  }

  /** Sends a request; its panel is appended, or placed after another. */
  private open(view: 'trace' | 'gradient', question: Question, beside?: Panel): void {
    const complete = view === 'gradient' && question.target === '' ? undefined : question
    if (!complete) {
      this.error.textContent = 'no target: enter the text that the model should learn'
      return
    }
    this.error.textContent = ''
    const panel = new Panel(view, complete, this.actions)
    panel.frame.post({ theme: this.theme() })
    this.panels.push(panel)
    const layers = this.models.get(question.model)?.nLayers ?? 1
    if (view === 'gradient') addEdits(panel, layers, () => this.form.probePrompts())
    if (beside) beside.element.after(panel.element)
    else this.answers.append(panel.element)
    void panel.run()
  }
}

function samePrompt(a: Question, b: Question): boolean {
  return a.prompt === b.prompt && a.model === b.model
}

/** The prompt and model of a question; the target is taken from the form. */
function samePromptAs({ prompt, model }: Question): Partial<Question> {
  return { prompt, model }
}

/** Actions of the form. */
export interface FormActions {
  trace: (question: Question) => void
  gradient: (question: Question) => void
}

const MATRICES = ['FF1', 'FF2', 'Q', 'K', 'V', 'O']
const LENSES = [
  ['FINAL_NORM', 'final norm'],
  ['NORMALIZED', 'normalized'],
  ['RAW', 'raw'],
] as const

/** The form: prompt, target and model, and further options under "more". */
export class Form {
  readonly element = element('form', { class: 'ask', 'aria-label': 'Ask' })
  readonly model = choice('Model', [], () => {})
  private readonly prompt = this.promptField()
  private readonly target = field('target', 'Target', 'the model’s own prediction')
  private readonly layers = field('layers', 'Layers', 'all, or 0-3,7')
  private readonly positions = field('positions', 'Positions', 'the last, all, or -1,3')
  private readonly heads = field('heads', 'Heads', '10, or 0 for all')
  private readonly subject = field('subject', 'Subject', 'part of the prompt')
  private readonly neurons = field('neurons', 'Neurons', '0')
  private readonly spectrum = field('spectrum', 'Singular values', '0')
  private readonly rate = field('rate', 'Learning rate', 'direction only')
  private readonly probes = field('probes', 'Probes', 'other prompts, separated by |')
  private readonly lens = choice('Lens', LENSES, () => {})
  private readonly matrices = MATRICES.map((kind, i) => checkbox(kind, i < 2))

  constructor(private readonly starts: FormActions) {
    const trace = button('Trace', 'Show which heads and neurons produce the answer', () => {})
    trace.type = 'submit'
    trace.classList.add('primary')
    const gradient = button(
      'Gradient',
      'Show what a training step towards the target changes',
      () => this.start('gradient'),
    )
    this.element.append(
      element('div', { class: 'ask-row' }, this.prompt, this.target),
      element('div', { class: 'ask-row' }, this.model, trace, gradient, this.more()),
    )
    this.element.addEventListener('submit', (event) => {
      event.preventDefault()
      this.start('trace')
    })
  }

  question(): Question {
    return {
      model: this.model.value,
      prompt: value(this.prompt),
      target: value(this.target),
      layers: value(this.layers),
      positions: value(this.positions),
      heads: value(this.heads),
      lens: this.lens.value,
      matrices: this.matrices.flatMap(({ box, kind }) => (box.checked ? [kind] : [])),
      subject: value(this.subject),
      neurons: value(this.neurons),
      spectrum: value(this.spectrum),
      rate: value(this.rate),
    }
  }

  /** Sets the text of the target field. */
  setTarget(text: string): void {
    const input = this.target.querySelector('input')
    if (input) input.value = text
  }

  /** Further prompts to evaluate in an edit preview. */
  probePrompts(): string[] {
    return value(this.probes)
      .split('|')
      .map((probe) => probe.trim())
      .filter((probe) => probe !== '')
  }

  /** A multi-line field: Enter submits, Shift-Enter inserts a line break. */
  private promptField(): HTMLLabelElement {
    const text = element('textarea', {
      name: 'prompt',
      placeholder: 'The capital of Japan is the city of',
      autocomplete: 'off',
      spellcheck: 'false',
      rows: '1',
      required: '',
      title: 'Enter starts a trace; Shift-Enter inserts a line break',
    })
    text.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return
      event.preventDefault()
      this.element.requestSubmit()
    })
    return element('label', { class: 'field prompt' }, element('span', {}, 'Prompt'), text)
  }

  private start(what: keyof FormActions): void {
    const input = this.target.querySelector('input')
    input?.setCustomValidity(
      what === 'gradient' && input.value === ''
        ? 'Enter the text that the model should learn.'
        : '',
    )
    if (this.element.reportValidity()) this.starts[what](this.question())
    input?.setCustomValidity('')
  }

  private more(): HTMLElement {
    const matrices = element('fieldset', { class: 'matrices' }, element('legend', {}, 'Matrices'))
    matrices.append(...this.matrices.map(({ label }) => label))
    return element(
      'details',
      { class: 'more' },
      element('summary', {}, 'more'),
      element('div', { class: 'ask-row' }, this.layers, this.positions, this.heads, this.lens),
      element('div', { class: 'ask-row' }, matrices, this.subject),
      element('div', { class: 'ask-row' }, this.neurons, this.spectrum, this.rate, this.probes),
    )
  }
}

function field(name: string, text: string, placeholder: string): HTMLLabelElement {
  const input = element('input', { name, placeholder, autocomplete: 'off', spellcheck: 'false' })
  return element('label', { class: `field ${name}` }, element('span', {}, text), input)
}

function value(label: HTMLLabelElement): string {
  return label.querySelector<HTMLInputElement | HTMLTextAreaElement>('input, textarea')?.value ?? ''
}

function checkbox(kind: string, checked: boolean) {
  const box = element('input', { type: 'checkbox', name: kind })
  box.checked = checked
  return { kind, box, label: element('label', {}, box, kind) }
}

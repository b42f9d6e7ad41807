import { button, choice } from '../parts/controls'
import { element } from '../parts/dom'
import type { Asked } from './requests'

/** What the form can start. */
export interface Starts {
  trace: (asked: Asked) => void
  gradient: (asked: Asked) => void
}

const MATRICES = ['FF1', 'FF2', 'Q', 'K', 'V', 'O']
const LENSES = [
  ['FINAL_NORM', 'final norm'],
  ['NORMALIZED', 'normalized'],
  ['RAW', 'raw'],
] as const

/** Where a person asks: prompt, target, model; the rest behind "more". */
export class Form {
  readonly element = element('form', { class: 'ask', 'aria-label': 'Ask' })
  readonly model = choice('Model', [], () => {})
  private readonly prompt = this.promptField()
  private readonly target = field('target', 'Target', 'the model’s own prediction')
  private readonly layers = field('layers', 'Layers', 'all; or 0-3,7')
  private readonly positions = field('positions', 'Positions', 'the last; all; or -1,3')
  private readonly heads = field('heads', 'Heads', '10; 0 = all')
  private readonly subject = field('subject', 'Subject', 'part of the prompt')
  private readonly neurons = field('neurons', 'Neurons', '0')
  private readonly spectrum = field('spectrum', 'Singular values', '0')
  private readonly rate = field('rate', 'Learning rate', 'only the direction')
  private readonly probes = field('probes', 'Probes', 'other prompts; split by |')
  private readonly lens = choice('Lens', LENSES, () => {})
  private readonly matrices = MATRICES.map((kind, i) => checkbox(kind, i < 2))

  constructor(private readonly starts: Starts) {
    const trace = button('Trace', 'Where does the answer come from?', () => {})
    trace.type = 'submit'
    trace.classList.add('primary')
    const gradient = button('Gradient', 'What would learning the target change?', () =>
      this.start('gradient'),
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

  asked(): Asked {
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

  /** Writes a target as if it were typed. */
  aim(text: string): void {
    const input = this.target.querySelector('input')
    if (input) input.value = text
  }

  /** Other prompts to look at when an edit is previewed. */
  watched(): string[] {
    return value(this.probes)
      .split('|')
      .map((probe) => probe.trim())
      .filter((probe) => probe !== '')
  }

  /** Of several lines, if need be: Enter asks, Shift-Enter begins a new one. */
  private promptField(): HTMLLabelElement {
    const text = element('textarea', {
      name: 'prompt',
      placeholder: 'The capital of Japan is the city of',
      autocomplete: 'off',
      spellcheck: 'false',
      rows: '1',
      required: '',
      title: 'Enter asks; Shift-Enter begins a new line',
    })
    text.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return
      event.preventDefault()
      this.element.requestSubmit()
    })
    return element('label', { class: 'field prompt' }, element('span', {}, 'Prompt'), text)
  }

  private start(what: keyof Starts): void {
    const input = this.target.querySelector('input')
    input?.setCustomValidity(
      what === 'gradient' && input.value === '' ? 'What is to be learnt?' : '',
    )
    if (this.element.reportValidity()) this.starts[what](this.asked())
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

function field(name: string, words: string, placeholder: string): HTMLLabelElement {
  const input = element('input', { name, placeholder, autocomplete: 'off', spellcheck: 'false' })
  return element('label', { class: `field ${name}` }, element('span', {}, words), input)
}

function value(label: HTMLLabelElement): string {
  return label.querySelector<HTMLInputElement | HTMLTextAreaElement>('input, textarea')?.value ?? ''
}

function checkbox(kind: string, checked: boolean) {
  const box = element('input', { type: 'checkbox', name: kind })
  box.checked = checked
  return { kind, box, label: element('label', {}, box, kind) }
}

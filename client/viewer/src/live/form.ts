import { button, choice, disclosure, element, setPressed, toggle } from '../presentation/elements'
import { chatOf, type Message, messagesOf, QUESTION, type Question } from './question'

// The form: a prompt or a conversation, the target and the model, and further options under "more".

/** Actions of the form. */
export interface FormActions {
  ask: (question: Question) => void
}

const MATRICES = ['FF1', 'FF2', 'Q', 'K', 'V', 'O']
const LENSES = [
  ['', 'final norm'],
  ['NORMALIZED', 'normalized'],
  ['RAW', 'raw'],
] as const

type Field = keyof Question

export class Form {
  readonly element = element('form', { class: 'ask', 'aria-label': 'Ask' })
  readonly model = choice('Model', [], () => {})
  /** Progress of the newest result, and errors. */
  readonly status = element('div', { class: 'ask-status' })
  private readonly chat = new ChatBox(() => this.start('generation'))
  private readonly prompt = promptField(() => this.element.requestSubmit())
  private readonly fields = new Map<Field, HTMLLabelElement>()
  private readonly probes = field('probes', 'Probes', 'other prompts, separated by |')
  private readonly lens = choice('Lens', LENSES, () => {})
  private readonly matrices = MATRICES.map((kind, i) => checkbox(kind, i < 2))
  private readonly modes = [
    toggle('Prompt', 'Ask about a text that the model continues', () => this.setChatting(false)),
    toggle('Chat', 'Ask about a conversation', () => this.setChatting(true)),
  ] as const
  private readonly trace = button(
    'Trace',
    'Show which heads and neurons produce the next token',
    () => {},
  )
  private readonly generate = button(
    'Generate',
    'Let the model continue, and show when each layer decides',
    () => this.start('generation'),
  )
  private chatting = false

  constructor(private readonly actions: FormActions) {
    this.trace.type = 'submit'
    const input = element('div', { class: 'ask-input' }, this.prompt, this.chat.element)
    const modes = element('div', { class: 'group modes', role: 'group', 'aria-label': 'Input' })
    modes.append(...this.modes)
    const target = this.field('target', 'Target', 'the model’s own prediction')
    this.element.append(
      element('div', { class: 'ask-row first' }, modes, input, target),
      element(
        'div',
        { class: 'ask-row' },
        this.model,
        this.trace,
        this.generate,
        button('Which heads matter?', 'Measure the prediction without each head', () =>
          this.start('effects'),
        ),
        button('Gradient', 'Show what a training step towards the target changes', () =>
          this.start('gradient'),
        ),
        this.more(),
      ),
      this.status,
    )
    this.element.noValidate = true // see `start`
    this.element.addEventListener('submit', (event) => {
      event.preventDefault()
      this.start('trace')
    })
    this.setChatting(false)
  }

  /** The question in the form, for one kind of result. */
  question(ask: string): Question {
    const texts = [...this.fields].map(([name, label]) => [name, value(label)])
    const chat = this.chatting ? { chat: chatOf(this.chat.messages()) } : {}
    const matrices = this.matrices.flatMap(({ box, kind }) => (box.checked ? [kind] : []))
    return {
      ...QUESTION,
      ...Object.fromEntries(texts),
      ask,
      model: this.model.value,
      prompt: this.chatting ? '' : value(this.prompt),
      ...chat,
      lens: this.lens.value,
      matrices: matrices.join(',') === 'FF1,FF2' ? '' : matrices.join(','),
    }
  }

  /** Shows a question. */
  show(question: Question): void {
    if (question.model !== '') this.model.value = question.model
    for (const [name, label] of this.fields) setValue(label, question[name])
    setValue(this.prompt, question.prompt)
    this.lens.value = question.lens
    const kinds = (question.matrices || 'FF1,FF2').split(',')
    for (const { box, kind } of this.matrices) box.checked = kinds.includes(kind)
    const messages = messagesOf(question)
    this.setChatting(messages.length > 0)
    if (messages.length > 0) this.chat.set(messages)
  }

  /** Sets the text of the target field. */
  setTarget(text: string): void {
    const label = this.fields.get('target')
    if (label) setValue(label, text)
  }

  /** Further prompts to evaluate in an edit preview. */
  probePrompts(): string[] {
    return value(this.probes)
      .split('|')
      .map((probe) => probe.trim())
      .filter((probe) => probe !== '')
  }

  /** Shows the conversation instead of the prompt, or the prompt. */
  private setChatting(chatting: boolean): void {
    this.chatting = chatting
    setPressed(this.modes[0], !chatting)
    setPressed(this.modes[1], chatting)
    this.trace.classList.toggle('primary', !chatting)
    this.generate.classList.toggle('primary', chatting)
    const shown = chatting ? this.chat.element : this.prompt
    for (const one of [this.prompt, this.chat.element]) one.hidden = one !== shown
    for (const label of [this.prompt, this.fields.get('target')]) label && clearNeeded(label)
  }

  /** Asks, unless a field that this kind of result needs is empty; then says what to enter. */
  private start(ask: string): void {
    const input = this.chatting ? this.chat.first() : this.prompt
    const target = this.fields.get('target')
    const empty = [
      value(input) === '' ? markNeeded(input, this.chatting ? MESSAGE : TEXT) : undefined,
      ask === 'gradient' && target && value(target) === ''
        ? markNeeded(target, LEARNED)
        : undefined,
    ]
    const first = empty.find((control) => control !== undefined)
    if (first) first.focus()
    else this.actions.ask(this.question(ask))
  }

  private field(name: Field, text: string, placeholder: string): HTMLLabelElement {
    const made = field(name, text, placeholder)
    this.fields.set(name, made)
    return made
  }

  private more(): HTMLElement {
    const matrices = element('fieldset', { class: 'matrices' }, element('legend', {}, 'Matrices'))
    matrices.append(...this.matrices.map(({ label }) => label))
    const row = (name: string, ...controls: HTMLElement[]) =>
      element(
        'div',
        { class: 'ask-row' },
        element('span', { class: 'row-name' }, name),
        ...controls,
      )
    return disclosure(
      'more',
      element('summary', {}, 'more'),
      row(
        'Trace',
        this.field('layers', 'Layers', 'all, or 0-3,7'),
        this.field('positions', 'Positions', 'the last, all, or -1,3'),
        this.field('heads', 'Heads', '10, or 0 for all'),
        this.lens,
      ),
      row(
        'Generate',
        this.field('tokens', 'Tokens', 'at most 64'),
        this.field('temperature', 'Temperature', '0: most likely'),
        this.field('seed', 'Seed', '0'),
        this.field('stop', 'Stop text', 'none'),
      ),
      row(
        'Gradient',
        matrices,
        this.field('subject', 'Subject', 'part of the prompt'),
        this.field('neurons', 'Neurons', '0'),
        this.field('spectrum', 'Singular values', '0'),
        this.field('rate', 'Learning rate', 'direction only'),
        this.probes,
      ),
    )
  }
}

/** The messages of a conversation, with their roles. */
class ChatBox {
  readonly element = element('div', { class: 'chat', role: 'group', 'aria-label': 'Conversation' })
  private readonly rows = element('ol', { class: 'messages' })

  constructor(private readonly submit: () => void) {
    const add = button('Add message', 'Add a message to the conversation', () => {
      const last = this.messages().at(-1)?.role
      this.append({ role: last === 'user' ? 'assistant' : 'user', content: '' }).focus()
    })
    this.element.append(this.rows, add)
    this.append({ role: 'user', content: '' })
  }

  messages(): Message[] {
    return [...this.rows.children].map((row) => ({
      role: row.querySelector('select')?.value ?? '',
      content: row.querySelector('textarea')?.value ?? '',
    }))
  }

  set(messages: readonly Message[]): void {
    this.rows.replaceChildren()
    for (const message of messages) this.append(message)
  }

  /** The first message, which must have a text. */
  first(): HTMLElement {
    return this.rows.firstElementChild as HTMLElement
  }

  private append({ role, content }: Message): HTMLTextAreaElement {
    const roles = ['system', 'user', 'assistant']
    if (!roles.includes(role)) roles.push(role)
    const select = choice(
      'Role',
      roles.map((name) => [name, name] as const),
      () => row.setAttribute('data-role', select.value),
    )
    select.value = role
    const text = textArea('generates an answer', this.submit)
    text.setAttribute('aria-label', 'Message')
    text.value = content
    const remove = button('×', 'Remove this message', () => {
      if (this.rows.children.length > 1) row.remove()
      else text.value = ''
    })
    const row = element('li', { class: 'message', 'data-role': role }, select, text, remove)
    this.rows.append(row)
    return text
  }
}

/** A multi-line field: Enter submits, Shift-Enter inserts a line break. */
function textArea(does: string, submit: () => void): HTMLTextAreaElement {
  const text = element('textarea', {
    autocomplete: 'off',
    spellcheck: 'false',
    rows: '1',
    title: `Enter ${does}; Shift-Enter inserts a line break`,
  })
  text.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return
    event.preventDefault()
    submit()
  })
  return text
}

function promptField(submit: () => void): HTMLLabelElement {
  const text = textArea('starts a trace', submit)
  text.name = 'prompt'
  text.placeholder = 'The capital of Japan is the city of'
  return element('label', { class: 'field prompt' }, element('span', {}, 'Prompt'), text)
}

const TEXT = 'Enter a text that the model continues.'
const MESSAGE = 'Enter a message.'
const LEARNED = 'Gradient needs the text that the model should learn, with its leading space.'

/** Says beside a field what to enter until the user enters something; returns its control. */
function markNeeded(around: HTMLElement, what: string): HTMLElement | undefined {
  const input = control(around)
  if (!input) return undefined
  clearNeeded(around)
  // Hidden, so that it describes the control and is not a part of its name.
  const note = element('span', { class: 'error needed', 'aria-hidden': 'true' }, what)
  note.id = `needed-${input.name || 'message'}`
  around.append(note)
  input.setAttribute('aria-invalid', 'true')
  input.setAttribute('aria-describedby', note.id)
  input.addEventListener('input', () => clearNeeded(around), { once: true })
  return input
}

function clearNeeded(around: HTMLElement): void {
  around.querySelector('.needed')?.remove()
  for (const name of ['aria-invalid', 'aria-describedby']) control(around)?.removeAttribute(name)
}

function field(name: string, text: string, placeholder: string): HTMLLabelElement {
  const input = element('input', { name, placeholder, autocomplete: 'off', spellcheck: 'false' })
  return element('label', { class: `field ${name}` }, element('span', {}, text), input)
}

function control(label: HTMLElement): HTMLInputElement | HTMLTextAreaElement | null {
  return label.querySelector('input, textarea')
}

function value(label: HTMLElement): string {
  return control(label)?.value ?? ''
}

function setValue(label: HTMLElement, text: string): void {
  const found = control(label)
  if (found) found.value = text
  if (text !== '') clearNeeded(label)
}

function checkbox(kind: string, checked: boolean) {
  const box = element('input', { type: 'checkbox', name: kind })
  box.checked = checked
  return { kind, box, label: element('label', {}, box, kind) }
}

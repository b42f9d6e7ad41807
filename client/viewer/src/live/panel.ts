import { save } from '../browser/export'
import type {
  Coordinates,
  FrameInput,
  FrameOutput,
  GeneratedChoice,
  KnockOutChoice,
} from '../browser/streams'
import type { GenerateResponse, WaitingMessage } from '../contract'
import { Generation } from '../model/generation'
import type { Token } from '../model/tokens'
import { button, choice, element } from '../presentation/elements'
import { waitingLine } from '../presentation/wording'
import { CallError, call, callOnce, savedPage } from './calls'
import {
  changedGeneration,
  type EditQuestion,
  editTitle,
  InvalidQuestion,
  knockOutRequest,
  previewRequest,
  promptOf,
  type Question,
  removedPart,
  SWEEPS,
  titleOf,
  VIEWS,
  type View,
} from './question'

// A panel of the live page: one question, its progress, and a frame with its result.

interface Progress {
  header?: { layers?: number[]; requestId?: string; experiments?: number }
  layer?: { layer?: number; last?: boolean }
  matrix?: { layer?: number; kind?: string; last?: boolean }
  generated?: object
  effect?: object
  summary?: object
}

export interface PanelActions {
  /** The user selected a layer and position in a frame. */
  selectionMoved: (from: Panel, place: Coordinates) => void
  /** The user chose another target for the same question. */
  targetChosen: (from: Panel, target: Token) => void
  /** The user selected a generated token. */
  generatedChosen: (from: Panel, choice: GeneratedChoice) => void
  /** The user wants another view of the same prompt. */
  beside: (panel: Panel, view: View) => void
  /** The user wants to go on from the generated text. */
  continued: (panel: Panel, text: string) => void
  /** The user wants a trace or a generation without a part. */
  removed: (panel: Panel, view: View, part: string) => void
  /** The user wants another sweep of the same prompt. */
  sweptOver: (panel: Panel, sweep: string) => void
  /** The user changed the names and notes of heads and neurons. */
  namesChanged: (from: Panel, names: string) => void
  /** The progress has changed. */
  progressed: (panel: Panel) => void
  closed: (panel: Panel) => void
}

export class Panel {
  readonly element = element('section', { class: 'answer-panel' })
  readonly bar = element('div', { class: 'panel-bar' })
  readonly streams: Record<string, string[]> = {}
  readonly frame: Frame
  /** The panel that shows the trace of the generated token selected last. */
  follower: Panel | undefined
  private readonly status = element('span', { class: 'status', role: 'status' })
  private readonly controller = new AbortController()
  private readonly cancel: HTMLButtonElement
  private names = ''
  private received = 0
  private experiments = 0

  constructor(
    readonly view: View,
    readonly question: Question,
    private readonly actions: PanelActions,
  ) {
    const title = titleOf(question)
    this.frame = new Frame(view, title, (news) => this.reported(news))
    this.element.setAttribute('aria-label', title)
    const name = view === 'generation' ? 'Stop' : 'Cancel'
    this.cancel = button(name, 'Stop the computation on the server', () => this.stop())
    const head = element(
      'div',
      { class: 'panel-head' },
      element('h2', {}, element('bdi', {}, title)),
    )
    head.append(button('×', 'Close', () => this.close()))
    this.bar.append(this.cancel, ...this.buttons(), this.status)
    this.element.append(element('div', { class: 'panel-top' }, head, this.bar), this.frame.element)
  }

  /** The state: waiting, running, done, failed or cancelled. */
  get state(): string {
    return this.element.dataset.state ?? ''
  }

  /** The progress in words. */
  get progress(): string {
    return this.status.textContent ?? ''
  }

  /** Sends the question and passes the messages to the frame as they arrive. */
  async run(): Promise<void> {
    const started = performance.now()
    this.setStatus('waiting', 'waiting for the server')
    try {
      await this.stream()
      const seconds = (performance.now() - started) / 1000
      this.setStatus('done', `${this.count()}done in ${seconds.toFixed(1)} s`)
    } catch (error) {
      this.failed(error)
    }
    this.cancel.remove()
    for (const stream of [this.view, 'overview']) this.frame.post({ stream, end: true })
  }

  stop(): void {
    this.controller.abort()
  }

  /** Shows names and notes of heads and neurons. */
  useNames(names: string): void {
    if (names === this.names) return
    this.names = names
    this.frame.post({ names })
  }

  /** Says why a request that started in this panel could not be sent. */
  refuse(reason: string): void {
    this.status.textContent = reason
  }

  /** Stores a line of a stream for saving, and passes it to the frame. */
  take(stream: string, line: string, message: unknown = JSON.parse(line)): void {
    const lines = this.streams[stream] ?? []
    this.streams[stream] = lines
    lines.push(line)
    this.frame.post({ stream, message })
  }

  private reported(news: FrameOutput): void {
    const { at, target, generated, knockOut, removed, regenerate, names } = news
    if (names !== undefined) this.actions.namesChanged(this, names)
    if (at) this.actions.selectionMoved(this, at)
    if (target) this.actions.targetChosen(this, target)
    if (generated) this.actions.generatedChosen(this, generated)
    if (removed) this.actions.removed(this, removed.view, removedPart(this.question, removed))
    if (regenerate) this.actions.removed(this, 'generation', regenerate)
    if (knockOut) void this.measure(knockOut)
  }

  /** Measures the prediction without a part, and posts the result to the frame. */
  private async measure(choice: KnockOutChoice): Promise<void> {
    const { id } = choice
    const lines: string[] = []
    const post = (message: object) => this.frame.post({ stream: 'knock-outs', message })
    try {
      for await (const line of call('Intervene', knockOutRequest(this.question, choice)))
        lines.push(line)
      this.streams[`knock-out:${id}`] = lines
      post({ id, responses: lines.map((line) => JSON.parse(line)) })
    } catch (error) {
      if (!(error instanceof CallError || error instanceof InvalidQuestion)) throw error
      post({ id, note: error.message })
    }
  }

  private async stream(): Promise<void> {
    const { signal } = this.controller
    const { method, request } = VIEWS[this.view]
    let around: Promise<void> | undefined
    for await (const line of call(method, request(this.question), signal, this.waits)) {
      const message = JSON.parse(line) as Progress
      this.take(this.view, line, message)
      this.follow(message)
      if (this.view === 'trace' && message.header) {
        around = this.requestOverview(line)
        around.catch(() => {}) // awaited below, unless the trace itself fails first
      }
    }
    this.frame.post({ stream: this.view, end: true })
    if (this.view === 'generation' && this.question.without !== '') await this.streamChanged()
    await around
  }

  /** Generates without the part that the question leaves out, beside the plain generation. */
  private async streamChanged(): Promise<void> {
    const { signal } = this.controller
    const { title, request } = changedGeneration(this.question)
    const stream = `generation:${title}`
    this.frame.post({ stream: 'variants', message: { stream, title } })
    for await (const line of call('Generate', request, signal, this.waits)) {
      const message = JSON.parse(line) as Progress
      this.take(stream, line, message)
      this.follow(message)
    }
    this.frame.post({ stream, end: true })
  }

  /** Requests the residual stream at the other positions. */
  private async requestOverview(header: string): Promise<void> {
    const question = { header, lens: this.question.lens || 'FINAL_NORM' }
    for await (const line of call('overview', question, this.controller.signal)) {
      this.take('overview', line)
    }
  }

  private readonly waits = (waiting: WaitingMessage) =>
    this.setStatus('waiting', waitingLine(waiting))

  private follow(message: Progress): void {
    const { layer, matrix, header, generated, effect } = message
    if (header?.experiments) this.experiments = header.experiments
    if (header) this.setStatus('running', 'forward pass finished')
    if (layer?.last) this.setStatus('running', `layer ${layer.layer ?? 0} received`)
    if (matrix?.last) {
      const kind = matrix.kind?.replace('MATRIX_KIND_', '') ?? ''
      this.setStatus('running', `layer ${matrix.layer ?? 0} ${kind} received`)
    }
    if (generated || effect) {
      this.received++
      this.setStatus('running', `${this.count()}${generated ? 'generating' : 'measuring'} …`)
    }
  }

  private count(): string {
    if (this.received === 0) return ''
    if (this.view === 'effects') return `${this.received} of ${this.experiments} experiments, `
    return `${this.received} ${this.received === 1 ? 'token' : 'tokens'}, `
  }

  private failed(error: unknown): void {
    if (this.controller.signal.aborted) {
      this.setStatus('cancelled', `${this.count()}${this.received > 0 ? 'stopped' : 'cancelled'}`)
      return
    }
    if (!(error instanceof CallError)) throw error
    const id = error.details.request_id ? ` (request ${error.details.request_id})` : ''
    this.setStatus('failed', `${error.message}${id}`)
  }

  private setStatus(state: string, text: string): void {
    this.element.dataset.state = state
    this.status.textContent = text
    this.actions.progressed(this)
  }

  private close(): void {
    this.stop()
    this.element.remove()
    this.actions.closed(this)
  }

  private buttons(): HTMLElement[] {
    const made = [
      button('Save page', 'Save this result as one HTML file', () => void this.savePage()),
      button('JSON', 'Save the messages as JSON lines', () => this.saveLines()),
    ]
    if (this.view === 'generation') {
      const go = () => this.actions.continued(this, this.generatedText())
      return [button('Continue', 'Put the generated text into the question', go), ...made]
    }
    if (this.view === 'effects') {
      const sweeps = Object.entries(SWEEPS).map(([key, { name }]) => [key, name] as const)
      const sweep = choice('Sweep', sweeps, (key) => this.actions.sweptOver(this, key))
      sweep.value = this.question.sweep
      return [sweep, ...made]
    }
    const other = this.view === 'trace' ? 'gradient' : 'trace'
    const name = `${VIEWS[other].name} beside it`
    return [
      button(name, 'Run it on the same prompt, beside this result', () =>
        this.actions.beside(this, other),
      ),
      ...made,
    ]
  }

  private generatedText(): string {
    const generation = new Generation()
    for (const line of this.streams.generation ?? []) {
      generation.feed(JSON.parse(line) as GenerateResponse)
    }
    return generation.text()
  }

  private async savePage(): Promise<void> {
    const names = this.view === 'trace' && this.names ? { names: this.names.split('\n') } : {}
    const streams = { ...this.streams, ...names }
    save(`${this.name()}.html`, 'text/html', await savedPage(this.view, streams))
  }

  private saveLines(): void {
    const lines = this.streams[this.view] ?? []
    save(`${this.name()}.jsonl`, 'application/jsonl', `${lines.join('\n')}\n`)
  }

  private name(): string {
    return `${promptOf(this.question)}-${this.view}`.replace(/[^\p{L}\p{N}]+/gu, '-')
  }
}

// The frame of one result, which runs the same program as a saved page.

export class Frame {
  readonly element: HTMLIFrameElement
  private waiting: FrameInput[] | undefined = []

  constructor(
    view: View,
    title: string,
    private readonly onReport: (news: FrameOutput) => void,
  ) {
    this.element = element('iframe', { src: `/frame/${view}`, title })
    window.addEventListener('message', (event: MessageEvent<FrameOutput>) => this.receive(event))
  }

  /** Posts a message, or queues it until the frame is ready. */
  post(posted: FrameInput): void {
    if (this.waiting) this.waiting.push(posted)
    else this.element.contentWindow?.postMessage(posted, window.location.origin)
  }

  private receive(event: MessageEvent<FrameOutput>): void {
    if (event.source !== this.element.contentWindow) return
    if (event.origin !== window.location.origin) return
    if (event.data.ready) this.flush()
    else this.onReport(event.data)
  }

  private flush(): void {
    const waiting = this.waiting ?? []
    this.waiting = undefined
    for (const posted of waiting) this.post(posted)
  }
}

// The controls for previewing an edit.

/** Adds the edit controls to a gradient's panel; `layers` is the model's number of layers. */
export function addEdits(panel: Panel, layers: number, watched: () => string[]): void {
  const strength = element('input', {
    class: 'search strength',
    'aria-label': 'Strength of the edit',
    value: '0.15',
    inputmode: 'decimal',
  })
  const names = Array.from({ length: layers }, (_, i) => [String(i), `layer ${i}`] as const)
  const layer = choice('Layer of the edit', names, () => {})
  layer.value = String(layers - 1)
  const kind = choice('Edit', EDITS, (value) => {
    strength.value = value === 'shift' ? '0.15' : '0.001'
    layer.hidden = value !== 'shift'
  })
  const said = element('span', { class: 'status', role: 'status' })
  const preview = button('Preview edit', 'Show what the edit changes in the prediction', () => {
    const edit: EditQuestion = {
      kind: kind.value as EditQuestion['kind'],
      strength: strength.value,
      layer: Number(layer.value),
    }
    said.textContent = ''
    show(panel, edit, watched()).catch((error: unknown) => {
      if (!(error instanceof CallError || error instanceof InvalidQuestion)) throw error
      said.textContent = error.message
    })
  })
  panel.bar.append(kind, layer, strength, preview, said)
}

const EDITS = [
  ['shift', 'forward shift by η'],
  ['descent', 'descent step with learning rate'],
] as const

async function show(panel: Panel, edit: EditQuestion, probes: readonly string[]): Promise<void> {
  const response = await callOnce('PreviewEdit', previewRequest(panel.question, edit, probes))
  const title = editTitle(edit)
  panel.streams[`preview:${title}`] = [JSON.stringify(response)]
  panel.frame.post({ stream: 'previews', message: { title, response } })
}

import { HashState } from '../page/hash'
import { setTheme, type Theme } from '../page/theme'
import { choice, THEMES } from '../parts/controls'
import { element } from '../parts/dom'
import { ask, CallError, keepToken } from './calls'
import { addEdits } from './edits'
import { Form } from './form'
import { type Neighbours, Panel } from './panel'
import type { Asked } from './requests'

interface ModelMessage {
  name?: string
  state?: string
  stateReason?: string
  nLayers?: number
}

/** Asks a live server and shows answers beside each other as they come. */
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
  private readonly trouble = element('p', { class: 'trouble', role: 'alert' })
  private readonly form = new Form({
    trace: (asked) => this.open('trace', asked),
    gradient: (asked) => this.open('gradient', asked),
  })
  private readonly neighbours: Neighbours = {
    moved: (from, place) => {
      for (const panel of this.panels) {
        if (panel !== from && samePrompt(panel.asked, from.asked)) panel.frame.post({ go: place })
      }
    },
    other: ({ view, asked }) =>
      this.open(view === 'trace' ? 'gradient' : 'trace', { ...this.form.asked(), ...same(asked) }),
    aimed: (from, target) => {
      if (!target.text.includes('\ufffd')) this.form.aim(target.text)
      const asked = { ...from.asked, target: target.text, aim: target }
      this.open(from.view, asked, from)
    },
    closed: (panel) => {
      this.panels.splice(this.panels.indexOf(panel), 1)
    },
  }

  constructor() {
    const header = element('header', { class: 'page-header live' })
    const theme = choice('Theme', THEMES, (value) => this.state.set({ theme: value }))
    header.append(element('h1', {}, 'Januslens'), this.form.element, theme, this.trouble)
    document.body.append(header, this.answers)
    const look = () => {
      theme.value = this.theme()
      setTheme(this.theme())
      for (const panel of this.panels) panel.frame.post({ theme: this.theme() })
    }
    this.state.subscribe(look)
    look()
  }

  private theme(): Theme {
    return this.state.get('theme') as Theme
  }

  async listModels(): Promise<void> {
    try {
      const { models = [] } = await ask<{ models?: ModelMessage[] }>('ListModels', {})
      for (const model of models) this.models.set(model.name ?? '', model)
      this.form.model.replaceChildren(
        ...models.map(({ name = '', state = '' }) => {
          const ready = state === 'STATE_READY'
          const words = ready ? name : `${name} (${state.replace('STATE_', '').toLowerCase()})`
          const option = element('option', { value: name }, words)
          option.disabled = !ready
          return option
        }),
      )
      const ready = models.find(({ state }) => state === 'STATE_READY')
      this.form.model.value = ready?.name ?? ''
    } catch (error) {
      if (!(error instanceof CallError)) throw error
      this.trouble.textContent = error.message
    }
  }

  /** Asks; the answer stands last, or beside another. */
  private open(view: 'trace' | 'gradient', asked: Asked, beside?: Panel): void {
    const complete = view === 'gradient' && asked.target === '' ? undefined : asked
    if (!complete) {
      this.trouble.textContent = 'A gradient needs a target: what is to be learnt.'
      return
    }
    this.trouble.textContent = ''
    const panel = new Panel(view, complete, this.neighbours)
    panel.frame.post({ theme: this.theme() })
    this.panels.push(panel)
    const layers = this.models.get(asked.model)?.nLayers ?? 1
    if (view === 'gradient') addEdits(panel, layers, () => this.form.watched())
    if (beside) beside.element.after(panel.element)
    else this.answers.append(panel.element)
    void panel.run()
  }
}

function samePrompt(a: Asked, b: Asked): boolean {
  return a.prompt === b.prompt && a.model === b.model
}

/** What the question beside an answer has in common with it; a target typed since is kept. */
function same({ prompt, model }: Asked): Partial<Asked> {
  return { prompt, model }
}

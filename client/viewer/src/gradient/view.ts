import { exportDialog } from '../browser/export'
import {
  ChangeTracker,
  oncePerFrame,
  revealSelected,
  type Shell,
  setTheme,
  shell,
  showSelection,
  type Theme,
} from '../browser/shell'
import {
  type Coordinates,
  connectToLivePage,
  isLive,
  messages,
  pageDescription,
  reportToParent,
  streamNames,
} from '../browser/streams'
import { listenForTargetChoice, type PageContents } from '../browser/target_choice'
import type { GradientResponse, PreviewEditResponse } from '../contract'
import { finite } from '../contract'
import { GradientModel, placeId, placeOf } from '../model/gradient'
import { matcher } from '../model/tokens'
import {
  element,
  helpDialog,
  promptText,
  provenanceLine,
  Tooltip,
  tokenText,
} from '../presentation/elements'
import { narrowest } from '../presentation/heatmap'
import { levelNotes, lossSentence, rendered } from '../presentation/sentences'
import { setTabStop } from '../presentation/svg'
import { gradientState, KEYS, listenToKeys, toolbar } from './controls'
import { componentTooltip, fillFacts } from './inspector'
import type { Shown } from './maps'
import { MapPanels } from './panels'
import { neuronTable, previewTable, spectrumTable, verificationLine } from './tables'

const PREVIEW = 'preview:'
const MAPS_GAP = 28 // px between two maps; the same as in styles/layout.css

/** Shows an embedded or posted gradient. */
export async function gradientPage(): Promise<void> {
  const view = new GradientView(shell(), pageDescription().title)
  connectToLivePage({
    select: (place) => view.selectPlace(place),
    theme: (theme) => view.state.set({ theme }),
  })
  view.state.subscribe(() => {
    const place = placeOf(view.state.get('sel'))
    if (place) reportToParent({ at: { layer: place.layer, position: place.position } })
  })
  const draw = oncePerFrame(() => view.draw())
  for await (const message of messages<GradientResponse>('gradient')) {
    view.feed(message)
    if (isLive()) draw()
  }
  view.draw()
  document.documentElement.dataset.ready = 'complete'
  await showPreviews(view) // above the maps
  if (!isLive()) view.revealSelection()
}

async function showPreviews(view: GradientView): Promise<void> {
  interface Titled {
    title: string
    response: PreviewEditResponse
  }
  if (isLive()) {
    for await (const found of messages<Titled>('previews'))
      view.preview(found.title, found.response)
    return
  }
  for (const name of streamNames().filter((stream) => stream.startsWith(PREVIEW))) {
    for await (const message of messages<PreviewEditResponse>(name)) {
      view.preview(name.slice(PREVIEW.length), message)
    }
  }
}

/** The view of a gradient. */
export class GradientView {
  readonly model = new GradientModel()
  readonly state = gradientState()
  private readonly panels: MapPanels
  private readonly heading = element('div', { class: 'heading' })
  private readonly tables = element('div', { class: 'details' })
  private readonly previews = element('div', { class: 'details' })
  private readonly updateToolbar: (experts: readonly number[]) => void
  private readonly shownPreviews = new Map<string, HTMLElement>()
  private readonly headerChanges = new ChangeTracker()
  private readonly factsChanges = new ChangeTracker()
  private readonly tableChanges = new ChangeTracker()
  private readonly widthChanges = new ChangeTracker()
  private exportWidth: number | undefined

  constructor(
    private readonly parts: Shell,
    title: string,
  ) {
    this.panels = new MapPanels(this.model, this.state)
    parts.header.prepend(this.heading)
    parts.main.append(this.previews, this.panels.element, this.tables)
    const help = helpDialog(KEYS)
    const commands = {
      help: () => help.showModal(),
      search: () => parts.toolbar.querySelector<HTMLInputElement>('.search')?.focus(),
      export: exportDialog({ title, stream: 'gradient', layout: (width) => this.layout(width) }),
    }
    this.updateToolbar = toolbar(parts.toolbar, this.state, commands)
    listenToKeys(this.state, commands)
    this.hoverWith(new Tooltip())
    for (const part of [parts.main, parts.aside]) {
      part.addEventListener('click', (event) => this.openLink(event))
    }
    listenForTargetChoice(parts.aside, this.model.tokens, () => this.contents())
    this.state.subscribe(() => this.draw())
    // Drawing changes the height, which must not cause another drawing.
    new ResizeObserver(() => {
      if (this.widthChanges.changed(parts.main.clientWidth)) this.draw()
    }).observe(parts.main)
  }

  private contents(): PageContents {
    const { prompt, targets, provenance } = this.model
    return { command: 'gradient', model: provenance.model ?? '', prompt, targets }
  }

  /** Adds a message of the stream; call `draw` to show it. */
  feed(message: GradientResponse): void {
    this.model.feed(message)
  }

  /** Shows the preview of an edit, replacing an earlier preview of the same edit. */
  preview(title: string, message: PreviewEditResponse): void {
    const [made] = previewTable(title, message)
    if (!made) return
    this.shownPreviews.get(title)?.remove()
    this.shownPreviews.set(title, made)
    this.previews.append(made)
  }

  /** Selects the component at a layer and position selected in another frame. */
  selectPlace({ layer, position }: Coordinates): void {
    const kind = placeOf(this.selected())?.kind
    if (kind) this.state.set({ sel: placeId({ layer, position, kind }) })
  }

  /** Scrolls to the component that a link selected. */
  revealSelection(): void {
    if (placeOf(this.state.get('sel'))) revealSelected(this.panels.element)
  }

  draw(): void {
    setTheme(this.state.get('theme') as Theme)
    this.updateToolbar(this.model.experts())
    const room = this.exportWidth ?? this.parts.main.clientWidth
    const positions = this.model.prompt.length
    if (positions === 0 || room === 0) return
    const selected = this.selected()
    const position = placeOf(selected)?.position ?? positions - 1
    if (this.headerChanges.changed(this.model.version, position)) {
      fillHeader(this.heading, this.model, position)
    }
    this.panels.draw(this.shown(room, selected))
    this.drawFacts(selected)
    this.drawTables()
    this.keepFocus(selected)
    showSelection(this.parts.aside, placeOf(this.state.get('sel')) ? selected : '')
    if (!performance.getEntriesByName('januslens-drawn').length) performance.mark('januslens-drawn')
  }

  /** Lays the maps out for an export of this width; undefined = for the window. */
  private layout(width: number | undefined): void {
    this.exportWidth = width
    this.draw()
  }

  private shown(room: number, selected: string): Shown {
    const { state } = this
    const least = narrowest(this.model.prompt.length)
    const half = (room - MAPS_GAP) / 2
    const width = half >= least ? half : room
    const colour = state.get('colour')
    return {
      width: Math.max(width, least),
      scrolls: width < least,
      sideBySide: half >= least,
      colour: colour === 'size' ? colour : '',
      byRank: colour === 'rank',
      selected,
      ends: state.get('ends'),
      target: Number(state.get('target') || 0),
      expert: this.expert(),
      wanted: matcher(state.get('q')),
    }
  }

  private expert(): number | undefined {
    const chosen = this.state.get('expert')
    return chosen === '' ? undefined : Number(chosen)
  }

  /** The chosen component, or else the largest one whose VJP is shown. */
  private selected(): string {
    const chosen = this.state.get('sel')
    if (placeOf(chosen)) return chosen
    const kind = this.model.kinds('VJP')[0] ?? this.model.kinds('INPUT')[0]
    if (!kind) return ''
    const parts = this.model.of(kind).flatMap((matrix) => matrix.components)
    const largest = parts.reduce(
      (a, b) => (finite(b.size) > finite(a.size) ? b : a),
      parts[0] as never,
    )
    return largest ? placeId({ layer: largest.matrix.layer, position: largest.position, kind }) : ''
  }

  private hoverWith(tooltip: Tooltip): void {
    this.panels.element.addEventListener('pointermove', (event) => {
      const id = (event.target as Element).closest<SVGElement>('[data-id]')?.dataset.id
      const place = placeOf(id ?? '')
      const found = place && this.model.at(place, this.expert())
      if (found) tooltip.show(componentTooltip(found, this.model), event.clientX, event.clientY)
      else tooltip.hide()
    })
    this.panels.element.addEventListener('pointerleave', () => tooltip.hide())
  }

  private drawFacts(selected: string): void {
    if (!this.factsChanges.changed(this.model.version, selected)) return
    fillFacts(this.parts.aside, this.model, placeOf(selected))
  }

  private drawTables(): void {
    const kinds = this.model.complete ? this.panels.kinds() : []
    if (!this.tableChanges.changed(this.model.version, ...kinds)) return
    this.tables.replaceChildren(
      ...kinds.flatMap((kind) => neuronTable(this.model, kind)),
      ...kinds.flatMap((kind) => spectrumTable(this.model, kind)),
      ...verificationLine(this.model),
    )
  }

  private openLink(event: Event): void {
    const id = (event.target as Element).closest<HTMLElement>('[data-id]')?.dataset.id
    if (!id || !placeOf(id)) return
    this.state.set({ sel: id })
    this.parts.live.textContent = this.parts.aside.querySelector('.where')?.textContent ?? ''
  }

  private keepFocus(selected: string): void {
    // The maps of other matrices have their Tab stop at the same layer and position.
    const place = CSS.escape(selected.slice(0, selected.lastIndexOf('/') + 1))
    for (const picture of this.parts.main.querySelectorAll('svg.picture')) {
      setTabStop(picture, picture.querySelector(`[tabindex][data-id^="${place}"]`) ?? undefined)
    }
  }
}

/** The prompt and targets, the summary, and the provenance. */
export function fillHeader(heading: HTMLElement, model: GradientModel, position: number): void {
  const targets = model.targets.map((token) => {
    const shown = tokenText(token.label)
    shown.classList.add('answer')
    return shown
  })
  const arrow = element('span', { class: 'arrow' }, ' ⇐ ')
  const title = element('h1', {}, promptText(model.prompt, position), arrow, ...targets)
  heading.replaceChildren(title, story(model), provenanceLine(model.provenance, model.complete))
}

function story(model: GradientModel): HTMLElement {
  const story = element('p', { class: 'story' }, ...rendered(lossSentence(model)))
  story.append(
    ' A descent step adds −η · xᵀδ to a matrix, where η is the learning rate: for inputs similar to x, ',
    'the output moves along −δ. ↑ marks the token that the step promotes most, ↓ the token that it suppresses most.',
  )
  if (model.skipped.length > 0) {
    story.append(` This model has no ${model.skipped.join(', ')}.`)
  }
  for (const note of levelNotes(model.limited)) story.append(` ${note}`)
  return story
}

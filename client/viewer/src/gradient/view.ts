import type { GradientResponse, PreviewEditResponse } from '../contract/gradient'
import { exportPage } from '../page/export'
import type { Coordinates } from '../page/feed'
import type { Shell } from '../page/shell'
import { setTheme, type Theme } from '../page/theme'
import { button, choice } from '../parts/controls'
import { element } from '../parts/dom'
import { rove } from '../parts/focus'
import { helpDialog } from '../parts/help'
import { Tooltip } from '../parts/tooltip'
import { fillFacts, glance } from './facts'
import { fillHeader } from './header'
import { KEYS, listenToKeys } from './keys'
import { GradientModel } from './model'
import { Pictures } from './panels'
import { gradientState, placeId, placeOf } from './state'
import { neuronTable, previewTable, spectrumTable, verificationLine } from './tables'

/** A gradient on the screen; fed by a recorded stream or by a live one. */
export class GradientView {
  readonly model = new GradientModel()
  readonly state = gradientState()
  private readonly pictures: Pictures
  private readonly heading = element('div', { class: 'heading' })
  private readonly tables = element('div', { class: 'details' })
  private readonly previews = element('div', { class: 'details' })
  private readonly updates: (() => void)[] = []

  constructor(
    private readonly parts: Shell,
    private readonly title: string,
  ) {
    this.pictures = new Pictures(this.model, this.state)
    parts.header.prepend(this.heading)
    parts.main.append(this.pictures.element, this.previews, this.tables)
    this.fillToolbar()
    for (const part of [parts.main, parts.aside]) {
      part.addEventListener('click', (event) => this.follow(event))
    }
    this.state.subscribe(() => this.draw())
    new ResizeObserver(() => this.draw()).observe(parts.main)
    window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.draw())
  }

  /** Takes one more message of the stream; call `draw` when it is to be seen. */
  feed(message: GradientResponse): void {
    this.model.feed(message)
  }

  /** Shows what an edit would do. */
  preview(title: string, message: PreviewEditResponse): void {
    this.previews.append(...previewTable(title, message))
  }

  /** Selects what stands at the same place as something selected elsewhere. */
  go({ layer, position }: Coordinates): void {
    const kind = placeOf(this.selected())?.kind
    if (kind) this.state.set({ sel: placeId({ layer, position, kind }) })
  }

  draw(): void {
    setTheme(this.state.get('theme') as Theme)
    for (const update of this.updates) update()
    const width = this.parts.main.clientWidth
    if (this.model.prompt.length === 0 || width === 0) return
    fillHeader(this.heading, this.model)
    this.pictures.draw(width, this.selected())
    fillFacts(this.parts.aside, this.model, placeOf(this.selected()))
    this.drawTables()
    this.keepFocus()
  }

  /** The chosen component, else the largest one of the matrices that write. */
  private selected(): string {
    const chosen = this.state.get('sel')
    if (placeOf(chosen)) return chosen
    const kind = this.model.kinds('VJP')[0] ?? this.model.kinds('INPUT')[0]
    if (!kind) return ''
    const parts = this.model.of(kind).flatMap((matrix) => matrix.components)
    const largest = parts.reduce((a, b) => (b.size > a.size ? b : a), parts[0] as never)
    return largest ? placeId({ layer: largest.matrix.layer, position: largest.position, kind }) : ''
  }

  private hoverWith(tooltip: Tooltip): void {
    this.pictures.element.addEventListener('pointermove', (event) => {
      const id = (event.target as Element).closest<SVGElement>('[data-id]')?.dataset.id
      const place = placeOf(id ?? '')
      const found = place && this.model.at(place.kind, place.layer, place.position)
      if (found) tooltip.show(glance(found, this.model), event.clientX, event.clientY)
      else tooltip.hide()
    })
    this.pictures.element.addEventListener('pointerleave', () => tooltip.hide())
  }

  private drawTables(): void {
    const kinds = this.model.complete ? this.pictures.kinds() : []
    this.tables.replaceChildren(
      ...kinds.flatMap((kind) => neuronTable(this.model, kind)),
      ...kinds.flatMap((kind) => spectrumTable(this.model, kind)),
      ...verificationLine(this.model),
    )
  }

  private follow(event: Event): void {
    const id = (event.target as Element).closest<HTMLElement>('[data-id]')?.dataset.id
    if (!id || !placeOf(id)) return
    this.state.set({ sel: id })
    this.parts.live.textContent = this.parts.aside.querySelector('.where')?.textContent ?? ''
  }

  private keepFocus(): void {
    const id = CSS.escape(this.selected())
    for (const picture of this.parts.main.querySelectorAll('svg.picture')) {
      rove(picture, picture.querySelector(`[tabindex][data-id="${id}"]`) ?? undefined)
    }
  }

  private fillToolbar(): void {
    const help = helpDialog(KEYS)
    this.hoverWith(new Tooltip())
    listenToKeys(this.state, () => help.showModal())
    const ends = choice('Ends', ENDS, (value) => this.state.set({ ends: value }))
    const theme = choice('Theme', THEMES, (value) => this.state.set({ theme: value }))
    const exporter = choice('Export', EXPORTS, (format) => {
      void exportPage(format, this.title, 'gradient')
      exporter.value = ''
    })
    this.updates.push(() => {
      ends.value = this.state.get('ends')
      theme.value = this.state.get('theme')
    })
    this.parts.toolbar.append(
      ends,
      theme,
      exporter,
      button('?', 'Keys', () => help.showModal()),
    )
  }
}

const ENDS = [
  ['', '▲ top and ▼ bottom'],
  ['top', '▲ top only'],
  ['bottom', '▼ bottom only'],
] as const
const THEMES = [
  ['', 'system'],
  ['light', 'light'],
  ['dark', 'dark'],
] as const
const EXPORTS = [
  ['', 'export'],
  ['json', 'JSON lines'],
  ['svg', 'SVG'],
  ['png', 'PNG'],
] as const

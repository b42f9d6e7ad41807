import type { GradientModel } from '../model/gradient'
import { choice, element, tokenText } from '../presentation/elements'
import {
  drawHeatMap,
  type HeatMap,
  heatPicture,
  type Legend,
  rankLegend,
} from '../presentation/heatmap'
import { needsRedraw, type Svg } from '../presentation/svg'
import type { GradientKey, GradientState } from './controls'
import { factorMap, rankMap, rankName, type Shown, scaleLegend, scaleOf, segmentMap } from './maps'

// The heat maps of a gradient's page, each with a choice of the matrix.

const BAR = 36 // px, height of a panel's title

interface Panel {
  box: HTMLElement
  title: HTMLElement
  kinds: HTMLSelectElement
  picture: Svg
}

export class MapPanels {
  readonly element = element('div', { class: 'details matrix-maps' })
  private readonly imprint: Panel
  private readonly shift: Panel
  private readonly rank: Panel
  private readonly segments: Panel
  private readonly targets: HTMLSelectElement

  constructor(
    private readonly model: GradientModel,
    private readonly state: GradientState,
  ) {
    this.shift = this.panel('shift', 'Promoted and suppressed tokens by layer and position')
    this.imprint = this.panel('imprint', 'Tokens of the input x by layer and position')
    this.rank = this.panel('rank', 'Rank of the target by layer and position')
    this.segments = this.panel('rank', 'Means by segment of the prompt')
    // Its cells take no focus, so the panel itself must: the keyboard can then scroll it.
    this.segments.picture.node()?.parentElement?.setAttribute('tabindex', '0')
    this.targets = choice('Target', [], (value) => state.set({ target: value }))
    this.rank.kinds.after(this.targets)
  }

  /** The matrices shown. */
  kinds(): string[] {
    return [this.kind('imprint'), this.kind('shift')].filter((kind) => kind !== '')
  }

  draw(shown: Shown): void {
    this.element.classList.toggle('side-by-side', shown.sideBySide)
    const shift = 'what a descent step promotes ↑ and suppresses ↓'
    this.drawFactors(this.shift, 'shift', shift, shown)
    this.drawFactors(this.imprint, 'imprint', 'top tokens of x, its input', shown)
    this.drawRanks(shown)
    this.drawSegments(shown.width)
  }

  private drawFactors(panel: Panel, key: 'imprint' | 'shift', text: string, shown: Shown): void {
    const kind = this.kind(key)
    panel.box.hidden = kind === ''
    if (kind === '') return
    setOptions(panel.kinds, this.model.kinds(key === 'shift' ? 'VJP' : 'INPUT'), kind)
    panel.title.replaceChildren(`${kind}: ${text}`)
    const scale = scaleOf(this.model, kind, shown.colour)
    const legend = shown.byRank
      ? rankLegend(shown.width)
      : scaleLegend(scale, this.model.prompt, shown.width)
    this.show(panel, factorMap(this.model, kind, shown, scale), legend)
    if (shown.scrolls) scrollTo(panel, shown.selected)
  }

  private drawRanks(shown: Shown): void {
    const kind = this.rankKind()
    this.rank.box.hidden = kind === '' || this.model.targets.length === 0
    setOptions(this.rank.kinds, this.allKinds(), kind)
    const promoted = this.model.of(kind)[0]?.promoted ?? ''
    const token = this.model.targets[shown.target] ?? this.model.targets[0]
    this.rank.title.replaceChildren(
      `${kind}: ${rankName(promoted)} of `,
      tokenText(token?.label ?? ''),
      promoted ? '; a descent step promotes rank 0 most' : ' in its input x',
    )
    this.targets.hidden = this.model.targets.length < 2
    const text = this.model.targets.map((t, i) => [String(i), t.label] as const)
    setOptions(
      this.targets,
      text.map(([i]) => i),
      String(shown.target),
      text.map(([, t]) => t),
    )
    this.show(this.rank, rankMap(this.model, kind, shown), rankLegend(shown.width))
    if (shown.scrolls) scrollTo(this.rank, shown.selected)
  }

  private drawSegments(room: number): void {
    const kind = this.rankKind()
    const known = this.model.segments.some((segment) => segment.kind === kind)
    this.segments.box.hidden = !known
    if (!known) return
    setOptions(this.segments.kinds, this.allKinds(), kind)
    this.segments.title.replaceChildren(
      `${kind}: mean |δ| and mean ${rankName(this.model.of(kind)[0]?.promoted ?? '')} of the target by segment of the prompt`,
    )
    // The scale of the positions' norms, of which a segment of one token has the same colour.
    const scale = scaleOf(this.model, kind, '')
    const map = segmentMap(this.model, kind, scale, room)
    this.show(this.segments, map, scaleLegend(scale, this.model.prompt, map.width))
  }

  private show(panel: Panel, map: HeatMap, legend?: Legend): void {
    drawHeatMap(panel.picture, map, legend)
    // The height for the browser to assume while the panel is off screen and not rendered.
    const height = Number(panel.picture.attr('height')) + BAR
    panel.box.style.containIntrinsicBlockSize = `${height}px`
  }

  private allKinds(): string[] {
    return [...this.model.kinds('VJP'), ...this.model.kinds('INPUT')]
  }

  private kind(key: 'imprint' | 'shift'): string {
    const kinds = this.model.kinds(key === 'shift' ? 'VJP' : 'INPUT')
    const chosen = this.state.get(key)
    return kinds.includes(chosen) ? chosen : (kinds[0] ?? '')
  }

  private rankKind(): string {
    const chosen = this.state.get('rank')
    const kinds = this.allKinds()
    return kinds.includes(chosen) ? chosen : this.kind('shift') || this.kind('imprint')
  }

  private panel(key: GradientKey, name: string): Panel {
    const title = element('h2', {}, name)
    const kinds = choice(`Matrix: ${name}`, [], (value) => this.state.set({ [key]: value }))
    const picture = heatPicture(name)
    const bar = element('div', { class: 'panel-bar' }, title, kinds)
    const frame = element('div', { class: 'frame' }, picture.node() as Node)
    const box = element('section', { class: 'panel' }, bar, frame)
    box.hidden = true // until it has data
    this.element.append(box)
    return { box, title, kinds, picture }
  }
}

/** Scrolls to the selected cell once, when the selection changes. */
function scrollTo({ picture }: Panel, selected: string): void {
  const frame = picture.node()?.parentElement
  if (!frame || !needsRedraw(frame, selected)) return
  const cell = frame.querySelector('.chip.selected') ?? frame.querySelector('.axis .selected')
  if (!cell) return
  const [at, around] = [cell.getBoundingClientRect(), frame.getBoundingClientRect()]
  frame.scrollLeft += at.left + at.width / 2 - (around.left + around.width / 2)
}

/** Sets the options of a drop-down list, and hides it if there is only one. */
function setOptions(
  select: HTMLSelectElement,
  values: readonly string[],
  chosen: string,
  text: readonly string[] = values,
): void {
  const known = Array.from(select.options, (option) => option.value).join()
  if (known !== values.join()) {
    select.replaceChildren(
      ...values.map((value, i) => element('option', { value }, text[i] ?? value)),
    )
  }
  select.value = chosen
  select.hidden = values.length < 2
}

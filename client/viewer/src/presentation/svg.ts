import type { Selection } from 'd3-selection'

export type Svg = Selection<SVGSVGElement, unknown, null, undefined>
export type Group = Selection<SVGGElement, unknown, null, undefined>

/** Width of a character in the pictures' font, 11.5 px monospaced. */
export const CHARACTER = 6.95

/** The group with this name, appended on first use; later groups are drawn above earlier ones. */
export function groupNamed(svg: Svg, name: string): Group {
  const found = svg.select<SVGGElement>(`g.${name}`)
  return found.empty() ? svg.append('g').attr('class', name) : found
}

/** Number of characters that fit into a width. */
export function charactersIn(width: number): number {
  return Math.max(1, Math.floor(width / CHARACTER))
}

/** Hatch patterns that distinguish remainders and subtractions without colour. */
export function defineHatches(svg: Svg): void {
  if (!svg.select('defs').empty()) return
  const defs = svg.append('defs')
  for (const [name, angle] of [
    ['hatch-rest', 45],
    ['hatch-minus', -45],
  ] as const) {
    const pattern = defs.append('pattern').attr('id', name).attr('patternUnits', 'userSpaceOnUse')
    pattern.attr('width', 5).attr('height', 5).attr('patternTransform', `rotate(${angle})`)
    pattern.append('rect').attr('width', 5).attr('height', 5)
    pattern.append('path').attr('d', 'M0,0V5')
  }
}

/** Sets the class of each element from its datum; unchanged elements are not touched. */
export function setClasses<Datum>(svg: Svg, chosen: string, of: (datum: Datum) => string): void {
  svg.selectAll<SVGElement, Datum>(chosen).each(function (datum) {
    const wanted = of(datum)
    if (this.getAttribute('class') !== wanted) this.setAttribute('class', wanted)
  })
}

const drawn = new WeakMap<Element, string>()

/** Whether `key` differs from the element's last key; skipping equal ones avoids layout work. */
export function needsRedraw(element: Element, key: string): boolean {
  if (drawn.get(element) === key) return false
  drawn.set(element, key)
  return true
}

// Keyboard navigation in a picture: one Tab stop, arrow keys to the nearest element.

export type Direction = 'ArrowLeft' | 'ArrowRight' | 'ArrowUp' | 'ArrowDown'

/** Makes one element of a picture its only Tab stop. */
export function setTabStop(picture: Element, current: Element | undefined): void {
  const stops = picture.querySelectorAll<SVGElement>('[tabindex]')
  const chosen = current ?? stops[stops.length - 1]
  for (const stop of stops) {
    const wanted = stop === chosen ? '0' : '-1'
    if (stop.getAttribute('tabindex') !== wanted) stop.setAttribute('tabindex', wanted)
  }
}

/** The nearest focusable element in a direction; sideways distance weighs four times as much. */
export function nearestInDirection(
  picture: Element,
  from: Element,
  direction: Direction,
): SVGElement | undefined {
  const here = centre(from)
  let best: SVGElement | undefined
  let least = Number.POSITIVE_INFINITY
  for (const stop of picture.querySelectorAll<SVGElement>('[tabindex]')) {
    const there = centre(stop)
    const cost = distance(there.x - here.x, there.y - here.y, direction)
    if (stop !== from && cost < least) {
      best = stop
      least = cost
    }
  }
  return best
}

function centre(element: Element): { x: number; y: number } {
  const box = element.getBoundingClientRect()
  return { x: box.left + box.width / 2, y: box.top + box.height / 2 }
}

function distance(dx: number, dy: number, direction: Direction): number {
  const horizontal = direction === 'ArrowLeft' || direction === 'ArrowRight'
  const sign = direction === 'ArrowLeft' || direction === 'ArrowUp' ? -1 : 1
  const ahead = sign * (horizontal ? dx : dy)
  const aside = Math.abs(horizontal ? dy : dx)
  return ahead < 3 ? Number.POSITIVE_INFINITY : ahead + 4 * aside
}

export interface Column {
  position: number
  x: number
  width: number
  /** Wide enough for a token's text. */
  labelled: boolean
}

export const GUTTER = 46

const GAP = 10

export const NARROWEST_LABEL = 58

const WIDEST = 116

const LENS = 10

export function columnsIn(
  positions: number,
  selected: number,
  left: number,
  room: number,
): Column[] {
  const even = Math.min(WIDEST, room / positions)
  if (even >= NARROWEST_LABEL || positions <= 3) {
    return Array.from({ length: positions }, (_, position) => ({
      position,
      x: left + position * even,
      width: even - GAP,
      labelled: true,
    }))
  }
  return lens(positions, selected, left, room)
}

const SELECTED = 1.6 // width of the selected column relative to other labelled ones

/** Up to ten labelled columns around the selected one, which is wider; the rest are narrow, as a heat map. */
function lens(positions: number, selected: number, left: number, room: number): Column[] {
  const shown = Math.max(3, Math.min(LENS, Math.floor((room * 0.8) / NARROWEST_LABEL)))
  const others = Math.min(room * 0.24, (positions - shown) * 16)
  const wide = Math.min(84, (room - others - 2 * GAP) / (shown + SELECTED - 1))
  const taken = wide * (shown + SELECTED - 1) + 2 * GAP
  const narrow = Math.min(20, (room - taken) / (positions - shown))
  const first = Math.max(0, Math.min(positions - shown, selected - Math.floor(shown * 0.7)))
  const columns: Column[] = []
  let x = left
  for (let position = 0; position < positions; position++) {
    const labelled = position >= first && position < first + shown
    if (position > 0 && (position === first || position === first + shown)) x += GAP
    const pitch = position === selected ? wide * SELECTED : labelled ? wide : narrow
    const gap = labelled ? Math.min(GAP, 6) : Math.min(2, narrow * 0.2)
    columns.push({ position, x, width: pitch - gap, labelled })
    x += pitch
  }
  return columns
}

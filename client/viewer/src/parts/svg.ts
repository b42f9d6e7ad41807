import type { Selection } from 'd3-selection'

export type Svg = Selection<SVGSVGElement, unknown, null, undefined>
export type Group = Selection<SVGGElement, unknown, null, undefined>

/** Width of one character of the pictures' type, 11.5 px and monospaced. */
export const CHARACTER = 6.95

/** The group of one name, made at its place the first time: later groups lie above earlier ones. */
export function stratum(svg: Svg, name: string): Group {
  const found = svg.select<SVGGElement>(`g.${name}`)
  return found.empty() ? svg.append('g').attr('class', name) : found
}

/** How many characters fit into a width. */
export function fitting(width: number): number {
  return Math.max(1, Math.floor(width / CHARACTER))
}

/** Hatching, so that a remainder and a subtraction are told apart without colour. */
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

/** Gives elements the classes that their data ask for; what has them is not touched. */
export function classify<Datum>(svg: Svg, chosen: string, of: (datum: Datum) => string): void {
  svg.selectAll<SVGElement, Datum>(chosen).each(function (datum) {
    const wanted = of(datum)
    if (this.getAttribute('class') !== wanted) this.setAttribute('class', wanted)
  })
}

const drawn = new WeakMap<Element, string>()

/** Whether an element is to be drawn differently than before; a browser lays out what is set anew. */
export function isNew(element: Element, key: string): boolean {
  if (drawn.get(element) === key) return false
  drawn.set(element, key)
  return true
}

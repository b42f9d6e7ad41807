// Norms as colours: cream to plum on a square-root scale, so that what is small is not all the same.
// On dark paper the scale is turned over: in both the large stand out from the paper. The browser
// takes the colour of its scheme, so that a change of theme, or paper, draws nothing anew.

type Rgb = readonly [number, number, number]

const LIGHT: readonly Rgb[] = [
  [245, 236, 222],
  [244, 199, 160],
  [231, 147, 124],
  [181, 83, 120],
  [94, 42, 104],
]
const DARK: readonly Rgb[] = [
  [38, 35, 46],
  [78, 48, 84],
  [142, 66, 116],
  [216, 122, 118],
  [248, 220, 192],
]

/** Colours in CSS, each one for light paper and one for dark. */
export interface Paint {
  fill: string
  ink: string
}

/** The colour of a norm among others up to `largest`, and the ink that is readable on it. */
export function normPaint(norm: number, largest: number): Paint {
  const part = largest > 0 ? Math.sqrt(Math.min(1, Math.max(0, norm / largest))) : 0
  const [light, dark] = [between(LIGHT, part), between(DARK, part)]
  return {
    fill: `light-dark(rgb(${light.join(' ')}), rgb(${dark.join(' ')}))`,
    ink: `light-dark(${inkOn(light)}, ${inkOn(dark)})`,
  }
}

/** A few steps of the scale, for its legend. */
export function normSteps(count: number): string[] {
  return Array.from({ length: count }, (_, i) => normPaint(i, count - 1).fill)
}

function between(stops: readonly Rgb[], part: number): Rgb {
  const place = part * (stops.length - 1)
  const below = Math.min(Math.floor(place), stops.length - 2)
  const [low, high] = [stops[below] ?? stops[0], stops[below + 1] ?? stops[0]]
  const mix = (i: 0 | 1 | 2) => {
    const [a, b] = [low?.[i] ?? 0, high?.[i] ?? 0]
    return Math.round(a + (b - a) * (place - below))
  }
  return [mix(0), mix(1), mix(2)]
}

/** Black or white, whichever has more contrast (WCAG 2.2, relative luminance). */
function inkOn(colour: Rgb): string {
  const [red, green, blue] = colour.map((part) => {
    const value = part / 255
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4
  })
  const luminance = 0.2126 * (red ?? 0) + 0.7152 * (green ?? 0) + 0.0722 * (blue ?? 0)
  return (luminance + 0.05) ** 2 > 1.05 * 0.05 ? '#000' : '#fff'
}

import { HashState } from '../page/hash'

/** What a link to a gradient's page can say; '' = the page's own choice. */
export const GRADIENT_STATE = {
  /** Matrix whose inputs are shown. */
  imprint: '',
  /** Matrix whose VJPs are shown. */
  shift: '',
  /** Matrix whose ranks of the target are shown. */
  rank: '',
  /** Which target, where the loss has several: its place among them. */
  target: '',
  /** Which ends of the rankings are shown: both, top or bottom. */
  ends: '',
  /** Which expert of a mixture is shown; '' = at every place the one of the largest component. */
  expert: '',
  /** Text or token id searched for. */
  q: '',
  /** The selected component, e.g. `L3/p7/FF2`. */
  sel: '',
  theme: '',
} as const

export type GradientKey = keyof typeof GRADIENT_STATE
export type GradientState = HashState<GradientKey>

export function gradientState(): GradientState {
  return new HashState<GradientKey>(GRADIENT_STATE)
}

/** Where a component is: its layer and position are those of the flow graph's nodes. */
export interface Place {
  layer: number
  position: number
  kind: string
}

export function placeId({ layer, position, kind }: Place): string {
  return `L${layer}/p${position}/${kind}`
}

export function placeOf(id: string): Place | undefined {
  const match = id.match(/^L(\d+)\/p(\d+)\/(\w+)$/)
  if (!match) return undefined
  return { layer: Number(match[1]), position: Number(match[2]), kind: match[3] ?? '' }
}

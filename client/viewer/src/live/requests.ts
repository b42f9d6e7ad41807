// From what is typed to requests as protobuf JSON; what the server refuses it says by field.

import type { Token } from '../label/tokens'

/** What a person asks, as typed. */
export interface Asked {
  model: string
  prompt: string
  target: string
  /** A token that was clicked, instead of a typed target. */
  aim?: Token | undefined
  layers: string
  positions: string
  heads: string
  lens: string
  matrices: string[]
  subject: string
  neurons: string
  spectrum: string
  rate: string
}

type Json = Record<string, unknown>

export function traceRequest(asked: Asked): Json {
  const positions = asked.positions.trim()
  return {
    ...common(asked),
    ...(asked.target === '' && !asked.aim ? {} : { target: target(asked) }),
    ...(positions === 'all' ? { allPositions: true } : { positions: numbers(positions) }),
    ...(asked.heads.trim() === '' ? {} : { selection: { heads: Number(asked.heads) } }),
    includeLogitContribution: true,
  }
}

export function gradientRequest(asked: Asked): Json {
  return {
    ...common(asked),
    nll: { target: target(asked) },
    matrices: asked.matrices.map((kind) => `MATRIX_KIND_${kind}`),
    neurons: Number(asked.neurons || 0),
    spectrumRank: Number(asked.spectrum || 0),
    ...(asked.rate.trim() === '' ? {} : { learningRate: Number(asked.rate) }),
    ...(asked.subject === '' ? {} : { subject: { text: asked.subject } }),
  }
}

export interface EditAsked {
  kind: 'shift' | 'descent'
  strength: number
  layer: number
}

export function previewRequest(asked: Asked, edit: EditAsked, probes: readonly string[]): Json {
  const { strength, layer } = edit
  return {
    model: asked.model,
    input: { prompt: asked.prompt },
    target: target(asked),
    ...(edit.kind === 'shift'
      ? { shift: { layer, eta: strength } }
      : { descent: { learningRate: strength } }),
    probes: probes.map((prompt) => ({ label: prompt, input: { prompt } })),
  }
}

export function editTitle({ kind, strength, layer }: EditAsked): string {
  return kind === 'shift'
    ? `What a forward-pass shift of layer ${layer} by ${strength} would do`
    : `What a step of learning rate ${strength} would do`
}

function target({ target, aim }: Asked): Json {
  return aim ? { tokenIds: { ids: [aim.id] } } : { text: target }
}

function common(asked: Asked): Json {
  return {
    model: asked.model,
    input: { prompt: asked.prompt },
    layers: numbers(asked.layers),
    lens: `LENS_${asked.lens}`,
  }
}

/** `0-3,7` as [0, 1, 2, 3, 7] and `-1,3` as [-1, 3]; '' as none. */
export function numbers(text: string): number[] {
  return text
    .split(',')
    .map((piece) => piece.trim())
    .filter((piece) => piece !== '')
    .flatMap((piece) => {
      const range = piece.match(/^(\d+)-(\d+)$/)
      if (!range) return [Number(piece)]
      const [first, last] = [Number(range[1]), Number(range[2])]
      return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => first + i)
    })
}

import { isolated } from './tokens'

// Names and notes that a reader gives to heads and neurons. They are a text, so that they can be a
// part of the page's address: one line per head or neuron with its key, name and note between tabs.

/** A reader's name and note; one of them can be empty. */
export interface Annotation {
  name: string
  note: string
}

/** Largest lengths in characters. */
export const LONGEST = { name: 40, note: 300 } as const
/** Largest number of annotated heads and neurons. */
export const MOST = 100

/** The coordinates of a node that decide which head or neuron it belongs to. */
interface Coordinates {
  kind: string
  layer: number | undefined
  head: number | undefined
  expert: number | undefined
  neuron: number | undefined
}

/**
 * The key of the head or neuron that a node belongs to: `L9.h6`, `L3.n511`, `L2.e1.n7` or, for a row
 * of W_O, `L3.o37`. Undefined for other nodes.
 */
export function annotationKey(node: Coordinates): string | undefined {
  const { kind, layer, head, expert, neuron } = node
  if (layer === undefined) return undefined
  if (head !== undefined) return `L${layer}.h${head}`
  if (neuron === undefined) return undefined
  if (kind === 'ATTENTION_NEURON') return `L${layer}.o${neuron}`
  return expert === undefined ? `L${layer}.n${neuron}` : `L${layer}.e${expert}.n${neuron}`
}

const KEY = /^L(\d{1,5})\.(?:h(\d{1,6})|o(\d{1,8})|(?:e(\d{1,6})\.)?n(\d{1,8}))$/

/** What a key stands for, with its name: `L9 head 6 “name mover”` or `L3 row 37 of W_O`. */
export function annotationTitle(key: string, name = ''): string {
  return name === '' ? keyName(key) : `${keyName(key)} “${isolated(name)}”`
}

function keyName(key: string): string {
  const [, layer, head, row, expert, neuron] = key.match(KEY) ?? []
  if (head !== undefined) return `L${layer} head ${head}`
  if (row !== undefined) return `L${layer} row ${row} of W_O`
  return `L${layer} ${expert === undefined ? '' : `expert ${expert} `}neuron ${neuron}`
}

/** The id of the node at a position that a key stands for. */
export function keyNode(key: string, position: number): string {
  const [, layer, head, row, expert, neuron] = key.match(KEY) ?? []
  const at = `L${layer}/p${position}`
  if (head !== undefined) return `${at}/HEAD_OUTPUT/h${head}`
  if (row !== undefined) return `${at}/ATTENTION_NEURON/n${row}`
  return `${at}/MLP_VALUE/${expert === undefined ? '' : `e${expert}/`}n${neuron}`
}

/** Reads annotations from their text; lines that are none are left out. */
export function annotationsOf(text: string): Map<string, Annotation> {
  const found = new Map<string, Annotation>()
  for (const line of text.split('\n')) {
    const [key = '', name = '', note = ''] = line.split('\t')
    const annotation = { name: cleaned(name, LONGEST.name), note: cleaned(note, LONGEST.note) }
    if (found.size < MOST && KEY.test(key) && !isEmpty(annotation)) found.set(key, annotation)
  }
  return found
}

/** The text with another annotation of a head or neuron, or without one if it is empty. */
export function annotated(text: string, key: string, annotation: Annotation): string {
  const annotations = annotationsOf(text)
  const { name, note } = annotation
  const kept = { name: cleaned(name, LONGEST.name), note: cleaned(note, LONGEST.note) }
  if (isEmpty(kept)) annotations.delete(key)
  else annotations.set(key, kept)
  return Array.from(annotations, ([of, { name, note }]) => `${of}\t${name}\t${note}`).join('\n')
}

function isEmpty({ name, note }: Annotation): boolean {
  return name === '' && note === ''
}

// Controls, separators of lines, and marks of direction that could reorder the text around them.
const UNSAFE = /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/gu

/** A text in one line, without characters that could change how other texts are shown. */
function cleaned(text: string, longest: number): string {
  const line = text.replace(UNSAFE, ' ').replace(/\s+/g, ' ').trim()
  return Array.from(line).slice(0, longest).join('').trim()
}

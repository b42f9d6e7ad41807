import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import type { GradientResponse, TraceResponse } from '../src/contract'
import { FlowGraph } from '../src/model/flow_graph'
import { GradientModel } from '../src/model/gradient'
import { contributionTree, residualSteps } from '../src/model/graph_queries'
import { BINS, normPaint, rankBin } from '../src/presentation/colours'
import {
  contributionLines,
  levelSentences,
  lossSentence,
  plain,
  traceSentences,
} from '../src/presentation/sentences'
import {
  at,
  count,
  measure,
  NODE_NAMES,
  nodeName,
  percent,
  probability,
  signed,
  waitingLine,
} from '../src/presentation/wording'

// The fixtures are written by the Python client (tests/client/presentation_fixtures.py describes
// them) and hold the pages to the words, numbers and colours of the command and the notebook.

const FIXTURES = join(process.cwd(), '../../tests/fixtures/presentation')

function fixture<Content>(name: string): Content {
  return JSON.parse(readFileSync(join(FIXTURES, `${name}.json`), 'utf-8')) as Content
}

/** The text with ASCII characters for the typographic ones, which only pages have. */
function ascii(text: string): string {
  return text.replaceAll('’', "'").replaceAll('−', '-')
}

const FORMATS: Record<string, (value: number) => string> = {
  probability,
  signed,
  percent,
  measure,
  count,
}

for (const [format, pairs] of Object.entries(
  fixture<Record<string, [number | string, string][]>>('numbers'),
)) {
  test(`numbers have the client's format: ${format}`, () => {
    const form = FORMATS[format]
    assert.ok(form)
    for (const [value, text] of pairs) assert.equal(ascii(form(Number(value))), text, `${value}`)
    assert.ok(pairs.length > 4)
  })
}

test('the place of a waiting request has the words of the command', () => {
  for (const [requestsAhead, expectedSeconds, text] of fixture<[number, number, string][]>(
    'waiting',
  ))
    assert.equal(waitingLine({ requestsAhead, expectedSeconds }), text)
})

interface Colours {
  rank_bins: [number | null, number | null, string][]
  norms: [number, number, [number, number, number], 'black' | 'white'][]
}

test('ranks have the client’s bins', () => {
  for (const [rank, vocabulary, bin] of fixture<Colours>('colours').rank_bins) {
    assert.equal(BINS[rankBin(rank ?? undefined, vocabulary ?? undefined)], bin)
  }
})

test('norms have the client’s colours in the light theme', () => {
  for (const [norm, largest, rgb, ink] of fixture<Colours>('colours').norms) {
    const paint = normPaint(norm, largest)
    assert.ok(paint.fill.startsWith(`light-dark(rgb(${rgb.join(' ')}),`), paint.fill)
    const colour = ink === 'black' ? '#000' : '#fff'
    assert.ok(paint.ink.startsWith(`light-dark(${colour},`), paint.ink)
  }
})

test('kinds of nodes have the client’s names', () => {
  const names = Object.entries(NODE_NAMES).map(([kind, name]) => [kind, ascii(name)])
  assert.deepEqual(Object.fromEntries(names), fixture('names'))
})

interface TraceCase {
  case: string
  stream: TraceResponse[]
  position: number
  sentences: string[]
  levels: string[]
  residual_steps: { name: string; place: string; node: string }[]
  contributions: [number, string, string][]
  node_names: Record<string, string>
}

for (const expected of fixture<TraceCase[]>('traces')) {
  test(`a trace is described as by the client: ${expected.case}`, () => {
    const graph = new FlowGraph()
    for (const message of expected.stream) graph.feed(message)
    const { position } = expected
    assert.deepEqual(
      traceSentences(graph, position).map((sentence) => ascii(plain(sentence))),
      expected.sentences,
    )
    assert.deepEqual(levelSentences(graph.limited), expected.levels)
    assert.deepEqual(
      residualSteps(graph, position).map(({ name, place, node }) => {
        return { name, place: ascii(place), node: node.id }
      }),
      expected.residual_steps,
    )
    const tree = contributionTree(graph, position, 16)
    const lines = tree ? contributionLines(tree, graph) : []
    assert.deepEqual(
      lines.map(({ depth, name, contribution }) => [
        depth,
        ascii(name),
        ascii(signed(contribution)),
      ]),
      expected.contributions,
    )
    const names = [...graph.nodes.values()].map((node) => [
      node.id,
      ascii(nodeName(node, graph.prompt)),
    ])
    assert.deepEqual(Object.fromEntries(names), expected.node_names)
  })
}

interface GradientCase {
  case: string
  stream: GradientResponse[]
  sentence: string
}

for (const { case: name, stream, sentence } of fixture<GradientCase[]>('gradients')) {
  test(`a loss is described as by the client: ${name}`, () => {
    const model = new GradientModel()
    for (const message of stream) model.feed(message)
    assert.equal(ascii(plain(lossSentence(model))), sentence)
  })
}

/** A colour in OKLab (Ottosson, 2020), where equal distances look equal. */
function okLab(rgb: readonly number[]): number[] {
  const linear = rgb.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  const times = (rows: number[][], vector: number[]) =>
    rows.map((row) => row.reduce((sum, value, i) => sum + value * (vector[i] ?? 0), 0))
  const cones = times(
    [
      [0.4122214708, 0.5363325363, 0.0514459929],
      [0.2119034982, 0.6806995451, 0.1073969566],
      [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    linear,
  )
  return times(
    [
      [0.2104542553, 0.793617785, -0.0040720468],
      [1.9779984951, -2.428592205, 0.4505937099],
      [0.0259040371, 0.7827717662, -0.808675766],
    ],
    cones.map(Math.cbrt),
  )
}

test('the largest addition and the largest subtraction look equally strong', () => {
  const theme = readFileSync('styles/theme.css', 'utf8')
  const colours = (name: string) => {
    const [, light = '', dark = ''] =
      theme.match(new RegExp(`--${name}: light-dark\\(#(\\w+), #(\\w+)\\)`)) ?? []
    return [light, dark].map((hex) =>
      [0, 2, 4].map((i) => Number.parseInt(hex.slice(i, i + 2), 16) / 255),
    )
  }
  const papers = colours('paper')
  const distances = (name: string) =>
    colours(name).map((colour, theme) => {
      const paper = papers[theme] ?? []
      const mixed = colour.map((value, i) => 0.55 * value + 0.45 * (paper[i] ?? 0))
      const ground = okLab(paper)
      return Math.hypot(...okLab(mixed).map((value, i) => value - (ground[i] ?? 0)))
    })
  const subtractions = distances('subtracts')
  for (const [theme, addition] of distances('head-adds').entries()) {
    assert.ok(Math.abs(addition / (subtractions[theme] ?? 0) - 1) < 0.02, String(addition))
  }
})

test('a text that is too long for its box keeps the position', () => {
  const prompt = ['␣Bakersfield', 'العاصمة'].map((label, id) => ({ id, text: label, label }))
  assert.equal(at(0, prompt), '␣Bakersfield (0)')
  assert.equal(at(0, prompt, 12), '␣Bakers… (0)')
  assert.equal(at(0, prompt, 3), '… (0)')
  assert.equal(at(1, prompt, 9), '\u2068العا…\u2069 (1)')
})

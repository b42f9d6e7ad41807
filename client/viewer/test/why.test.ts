import assert from 'node:assert/strict'
import { test } from 'node:test'
import { FlowGraph } from '../src/model/flow_graph'
import { contributionTree } from '../src/model/graph_queries'
import { charactersIn } from '../src/presentation/svg'
import { partsOf, whyLayout } from '../src/trace/why_layout'
import { stream } from './stream'

function made() {
  const graph = new FlowGraph()
  for (const message of stream()) graph.feed(message)
  const tree = contributionTree(graph, 1, 10)
  assert.ok(tree)
  return { graph, tree }
}

const sum = (values: readonly number[]) => values.reduce((a, b) => a + b, 0)

test('the parts of the why figure are disjoint and add up to the logit', () => {
  const { tree } = made()
  const parts = partsOf(tree)
  assert.deepEqual(
    parts.map(({ name }) => name),
    ['L0 head 3', 'L0 head 0', 'L0 neuron 9', 'embedding', 'L0 neuron 5'],
  )
  assert.ok(Math.abs(sum(parts.map((part) => part.contribution)) - tree.contribution) < 1e-9)
})

test('the sources of a head add up to its contribution', () => {
  const { graph, tree } = made()
  const at = whyLayout(graph, tree, 900)
  assert.deepEqual(
    at.sources.map(({ text }) => text),
    ['The (0)', '␣of (1)', 'other tokens'],
  )
  const ofHead3 = at.sourceRibbons.filter(({ node }) => node.head === 3)
  assert.ok(Math.abs(sum(ofHead3.map(({ share }) => share)) - 2.75) < 1e-9)
})

test('a long source token keeps its position in a narrow figure', () => {
  const { graph, tree } = made()
  graph.prompt[0] = { id: 1, text: 'Bakersfield', label: 'Bakersfield' }
  const texts = whyLayout(graph, tree, 350).sources.map(({ text }) => text)
  assert.deepEqual(texts, ['Bak… (0)', '␣of (1)', 'others'])
})

test('a neuron keeps its number in a figure of one column of a paper', () => {
  const { graph, tree } = made()
  const neuron = tree.parts.flatMap(({ parts }) => parts).find(({ node }) => node.neuron === 9)
  assert.ok(neuron)
  neuron.node.layer = 16
  neuron.node.neuron = 1935
  const { columns, rows } = whyLayout(graph, tree, 480)
  assert.ok(rows.some(({ name }) => name === 'L16 neuron 1935'))
  assert.ok(charactersIn(columns.chip - columns.name) >= 'L16 neuron 1935'.length)
})

test('the answer stacks every part at the thickness of its contribution', () => {
  const { graph, tree } = made()
  const { rows, stack } = whyLayout(graph, tree, 900)
  const perLogit = rows.map(({ ribbon }) => ribbon.h1 / Math.abs(ribbon.share))
  for (const scale of perLogit) assert.ok(Math.abs(scale - (perLogit[0] ?? 0)) < 1e-9)
  assert.ok(Math.abs(sum(rows.map(({ ribbon }) => ribbon.h1)) - stack.height) < 1e-9)
})

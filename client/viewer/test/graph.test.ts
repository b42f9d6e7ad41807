import assert from 'node:assert/strict'
import { test } from 'node:test'
import { FlowGraph } from '../src/model/flow_graph'
import {
  answerAppears,
  pathToTarget,
  search,
  selectionFlow,
  strongestDestination,
} from '../src/model/graph_queries'
import { passing } from '../src/trace/controls'
import { layerModel } from '../src/trace/layer_model'
import { arcsInto } from '../src/trace/overview_layout'
import { stream } from './stream'

function graph(): FlowGraph {
  const made = new FlowGraph()
  for (const message of stream()) made.feed(message)
  return made
}

test('a stream that is fed twice is the same graph', () => {
  const once = graph()
  for (const message of stream()) once.feed(message)
  assert.equal(once.partsOf('L0/p1/ATTENTION_CONCAT').length, 2)
  assert.ok(once.complete)
})

test('a graph is complete once all its streams are', () => {
  const [header, layer, summary] = stream()
  const made = new FlowGraph()
  assert.ok(header && layer && summary)
  made.feed(header)
  for (const message of stream()) made.feed(message)
  assert.ok(!made.complete)
  made.feed(summary)
  assert.ok(made.complete)
})

test('parts come largest share first', () => {
  const parts = graph().partsOf('L0/p1/ATTENTION_CONCAT')
  assert.deepEqual(
    parts.map(({ node }) => node.head),
    [3, 0],
  )
})

test('a token is read with its text from whichever message named it first', () => {
  const top = graph().node('L0/p1/RESIDUAL_MID')?.reading?.top[0]
  assert.equal(top?.token.label, '␣Tokyo')
})

test('the answer appears where its rank becomes and stays 0', () => {
  const answer = answerAppears(graph(), 1)
  assert.equal(answer?.node.id, 'L0/p1/RESIDUAL_MID')
  assert.equal(answer?.step, 'attention')
})

test('the path follows logits at sums, and the heads at attention', () => {
  assert.deepEqual(
    pathToTarget(graph(), 1).map(({ node }) => node.id),
    [
      'L0/p1/BLOCK_OUTPUT',
      'L0/p1/RESIDUAL_MID',
      'L0/p1/ATTENTION_OUTPUT',
      'L0/p1/ATTENTION_CONCAT',
      'L0/p1/HEAD_OUTPUT/h3',
      'L0/p1/MEMORY_VALUE/h3/s0',
      'L0/p1/MEMORY_KEY/h3/s0',
    ],
  )
})

test('a selection is followed through its fraction of what it is a part of', () => {
  const flow = selectionFlow(graph(), 'L0/p1/MEMORY_KEY/h3/s0')
  assert.equal(flow.get('L0/p1/MEMORY_VALUE/h3/s0'), 1)
  assert.equal(flow.get('L0/p1/HEAD_OUTPUT/h3'), 0.9)
  assert.equal(flow.get('L0/p1/HEAD_OUTPUT/h0'), undefined)
  assert.equal(strongestDestination(graph(), 'L0/p1/MLP_OUTPUT')?.id, 'L0/p1/BLOCK_OUTPUT')
})

test('arcs are as strong as the share of a share', () => {
  const [arc, ...others] = arcsInto(graph(), 1)
  assert.equal(others.length, 0)
  assert.equal(arc?.source, 0)
  assert.equal(arc?.head, 3)
  assert.ok(Math.abs((arc?.share ?? 0) - 0.63) < 1e-9)
})

test('a search takes text, whole tokens and ids', () => {
  const found = (query: string) => search(graph(), query).map(({ node }) => node.id)
  assert.equal(found('okyo').length, 5)
  assert.deepEqual(found('#3'), ['L0/p1/MEMORY_KEY/h3/s0'])
  assert.deepEqual(found(' kyo'), [])
  assert.deepEqual(found('  '), [])
})

test('filters say how much of a sum they keep', () => {
  const { rows } = layerModel(graph(), 0, 1).mlp
  const all = {
    key: '',
    minimum: 0,
    sign: '' as const,
    hidden: new Set<string>(),
    opened: new Set<string>(),
  }
  assert.equal(passing(rows, all).kept, 1)
  const adding = passing(rows, { ...all, sign: '+' })
  assert.deepEqual([adding.shown.length, adding.hidden], [1, 1])
  assert.ok(Math.abs(adding.kept - 1.2 / 1.4) < 1e-9)
})

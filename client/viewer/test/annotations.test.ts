import assert from 'node:assert/strict'
import { test } from 'node:test'
import {
  annotated,
  annotationKey,
  annotationsOf,
  annotationTitle,
  keyNode,
  LONGEST,
  MOST,
} from '../src/model/annotations'
import { FlowGraph } from '../src/model/flow_graph'
import { nodeName, shortName } from '../src/presentation/wording'
import { annotationLines } from '../src/trace/annotating'
import { stream } from './stream'

const HEAD = 'L0/p1/HEAD_OUTPUT/h3'

test('an annotation is changed and removed', () => {
  const one = annotated('', 'L0.h3', { name: ' name\tmover\n', note: '' })
  assert.deepEqual([...annotationsOf(one)], [['L0.h3', { name: 'name mover', note: '' }]])
  const two = annotated(one, 'L2.e1.n7', { name: '', note: 'dates' })
  assert.equal(annotationsOf(two).size, 2)
  assert.equal(annotated(two, 'L2.e1.n7', { name: '', note: ' ' }), one)
})

test('an annotation belongs to all nodes of its head or neuron, and to no other', () => {
  const graph = new FlowGraph()
  graph.annotate('L0.h3\tname mover\treads names')
  for (const message of stream()) graph.feed(message)
  const named = [...graph.nodes.values()].filter(({ annotation }) => annotation)
  assert.ok(named.some(({ id }) => id === HEAD))
  for (const node of named) assert.equal(annotationKey(node), 'L0.h3')
  const head = graph.node(HEAD)
  assert.ok(head)
  assert.equal(nodeName(head, graph.prompt), 'L0 head 3 “name mover” output')
  assert.equal(shortName(head), 'L0 head 3 “name mover”')
  assert.deepEqual(annotationLines(graph), ['L0 head 3 “name mover”: reads names'])
  const { labels } = graph
  graph.annotate('')
  assert.equal(shortName(head), 'L0 head 3')
  assert.notEqual(graph.labels, labels)
})

test('keys name heads, neurons, experts and rows of W_O', () => {
  const node = { layer: 2, head: undefined, expert: undefined, neuron: 7 }
  const keys: [string | undefined, string, string][] = [
    [annotationKey({ ...node, kind: 'MLP_VALUE' }), 'L2 neuron 7', 'L2/p4/MLP_VALUE/n7'],
    [
      annotationKey({ ...node, kind: 'MLP_KEY', expert: 1 }),
      'L2 expert 1 neuron 7',
      'L2/p4/MLP_VALUE/e1/n7',
    ],
    [
      annotationKey({ ...node, kind: 'ATTENTION_NEURON' }),
      'L2 row 7 of W_O',
      'L2/p4/ATTENTION_NEURON/n7',
    ],
    [
      annotationKey({ ...node, kind: 'HEAD_QUERY', neuron: undefined, head: 5 }),
      'L2 head 5',
      'L2/p4/HEAD_OUTPUT/h5',
    ],
  ]
  for (const [key, title, id] of keys) {
    assert.equal(annotationTitle(key ?? ''), title)
    assert.equal(keyNode(key ?? '', 4), id)
    assert.equal(annotationsOf(`${key}\tx\t`).size, 1)
  }
  assert.equal(annotationKey({ ...node, kind: 'BLOCK_OUTPUT', neuron: undefined }), undefined)
  assert.equal(annotationTitle('L2.h5', 'اسم'), 'L2 head 5 “\u2068اسم\u2069”')
})

test('hostile texts are bounded, and cannot reorder the text around them', () => {
  assert.equal(annotationsOf('"><script>\tx\ty\nL1\tx\t\nL1.h\tx\t\n\tx\t\nL1.h1').size, 0)
  const long = annotationsOf(`L1.h1\t${'n'.repeat(9999)}\t${'👩'.repeat(9999)}`).get('L1.h1')
  assert.equal(long?.name.length, LONGEST.name)
  assert.equal(Array.from(long?.note ?? '').length, LONGEST.note)
  const turned = annotationsOf('L1.h1\t\u202eabc\u2066\u0000d\ud800\t').get('L1.h1')
  assert.equal(turned?.name, 'abc d')
  const many = Array.from({ length: 2 * MOST }, (_, i) => `L1.h${i}\tx\t`).join('\n')
  assert.equal(annotationsOf(many).size, MOST)
})

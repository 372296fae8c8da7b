'use strict';

// What a user of the stock Node client does, one scenario beside the other.
//
// Arguments: name server, a word that makes topics and groups unique, and the scenarios (all if none is named). Prints one
// JSON line for each and exits with 1 when one failed. The client never asks for the template topic, so the topics
// Node_<scenario>_<suffix> have to be there before; one-way sends and batches it does not have.

const { Consumer, Message, Producer } = require('ali-ons');

const PATIENCE_MS = 60_000;
const [ nameSrv, suffix, ...chosen ] = process.argv.slice(2);
const silent = { info() {}, warn() {}, error() {}, debug() {} };

const sleep = ms => new Promise(resolve => setTimeout(resolve, ms));
const topicOf = name => `Node_${name}_${suffix}`;
const groupOf = name => `C_node_${name}_${suffix}`;

function check(condition, otherwise) {
  if (!condition) {
    throw new Error(otherwise);
  }
}

async function until(condition, what, patience = PATIENCE_MS) {
  const end = Date.now() + patience;
  while (!condition()) {
    check(Date.now() < end, `not within ${patience} ms: ${what()}`);
    await sleep(20);
  }
}

function settings(name) {
  return {
    nameSrv,
    // Asked for, but used only to look name servers up by a URL.
    httpclient: {},
    logger: silent,
    instanceName: name,
    // Seconds instead of half a minute until a retry topic's route is seen.
    pollNameServerInteval: 1000,
    heartbeatBrokerInterval: 2000,
    rebalanceInterval: 1000,
    clientIP: '127.0.0.1',
  };
}

async function withProducer(name, work) {
  const producer = new Producer({ ...settings(`p_${name}`), producerGroup: `P_node_${name}_${suffix}` });
  await producer.ready();
  try {
    return await work(producer);
  } finally {
    await producer.close();
  }
}

function consume(name, topic, filter, handler, maxReconsumeTimes = 16) {
  const consumer = new Consumer({
    ...settings(`c_${name}`),
    consumerGroup: groupOf(name),
    consumeFromWhere: 'CONSUME_FROM_FIRST_OFFSET',
    maxReconsumeTimes,
  });
  consumer.on('error', () => {});
  consumer.subscribe(topic, filter, handler);
  return consumer;
}

async function collect(name, topic, filter, wanted) {
  const found = [];
  const consumer = consume(name, topic, filter, async message => {
    found.push(message);
  });
  try {
    const missing = () => wanted.filter(body => !found.some(message => message.body.toString() === body));
    await until(() => missing().length === 0, missing);
    await sleep(300);
    return found;
  } finally {
    await consumer.close();
  }
}

const scenarios = {
  async retry_dlq() {
    const topic = topicOf('retry_dlq');
    await withProducer('retry', async producer => {
      const bad = new Message(topic, 'poison', 'bad');
      bad.keys = [ 'p' ];
      await producer.send(bad);
      await producer.send(new Message(topic, '', 'good'));
    });
    const attempts = [];
    const good = [];
    const consumer = consume('retry', topic, '*', async message => {
      if (message.body.toString() === 'good') {
        good.push(message);
        return;
      }
      attempts.push(message.reconsumeTimes);
      throw new Error('not today');
    }, 1);
    try {
      // This client asks for the broker's own delay, 10 s before the first redelivery.
      await until(() => attempts.length >= 2 && good.length, () => `attempts ${attempts}`);
      const deadTopic = `%DLQ%${groupOf('retry')}`;
      const dead = await collect('retry_dead', deadTopic, '*', [ 'bad' ]);
      check(attempts.join() === '0,1', `reconsume times ${attempts}`);
      check(dead[0].tags === 'poison' && dead[0].keys === 'p', 'tag or key of the dead letter');
      return `one retry, then ${deadTopic}`;
    } finally {
      await consumer.close();
    }
  },

  async sync() {
    const topic = topicOf('sync');
    const wanted = [];
    await withProducer('sync', async producer => {
      for (let i = 0; i < 20; i++) {
        const message = new Message(topic, 'tag', `sync-${i}`);
        message.keys = [ `k${i}` ];
        message.properties.colour = 'blue é';
        const result = await producer.send(message);
        check(result.sendStatus === 'SEND_OK', `status ${result.sendStatus}`);
        check(result.msgId, 'no message id');
        check(Number.isInteger(result.queueOffset), `queue offset ${result.queueOffset}`);
        wanted.push(`sync-${i}`);
      }
    });
    const found = await collect('sync', topic, '*', wanted);
    check(found.length === 20, `delivered ${found.length} times`);
    check(found.every(message => message.properties.colour === 'blue é'), 'user property');
    check(found.every(message => message.keys === `k${message.body.toString().slice(5)}`), 'keys');
    return '20 sent and consumed';
  },

  async async() {
    const topic = topicOf('async');
    const wanted = [];
    await withProducer('async', async producer => {
      const sends = [];
      for (let i = 0; i < 100; i++) {
        sends.push(producer.send(new Message(topic, '', `async-${i}`)));
        wanted.push(`async-${i}`);
      }
      const results = await Promise.all(sends);
      check(results.every(result => result.sendStatus === 'SEND_OK'), 'a send was not accepted');
    });
    await collect('async', topic, '*', wanted);
    return '100 at once, all consumed';
  },

  async ordered() {
    const topic = topicOf('ordered');
    const wanted = [];
    const queues = new Map();
    await withProducer('ordered', async producer => {
      for (let i = 0; i < 10; i++) {
        for (let order = 0; order < 5; order++) {
          const message = new Message(topic, 'order', `${order}-${i}`);
          message.shardingKey = `order-${order}`;
          const result = await producer.send(message);
          wanted.push(`${order}-${i}`);
          const queue = `${result.messageQueue.brokerName}/${result.messageQueue.queueId}`;
          queues.set(order, (queues.get(order) || new Set()).add(queue));
        }
      }
    });
    const found = await collect('ordered', topic, 'order', wanted);
    // This client takes queue number 0 for "no queue chosen", and with several broker names it picks the number only; order
    // is promised where one queue was used.
    const next = new Map();
    for (const message of found) {
      const [ order, step ] = message.body.toString().split('-').map(Number);
      if (queues.get(order).size > 1) {
        continue;
      }
      check(step === (next.get(order) || 0), `order ${order}: ${step} where ${next.get(order) || 0} was due`);
      next.set(order, step + 1);
    }
    return `${next.size} of 5 orders in one queue each, in order`;
  },

  async tag() {
    const topic = topicOf('tag');
    const wanted = [];
    await withProducer('tag', async producer => {
      const tags = [ 'new', 'paid', 'sent' ];
      for (let i = 0; i < 24; i++) {
        const tag = tags[i % 3];
        await producer.send(new Message(topic, tag, `${tag}-${i}`));
        if (tag !== 'sent') {
          wanted.push(`${tag}-${i}`);
        }
      }
    });
    const found = await collect('tag', topic, 'new || paid', wanted);
    check(found.length === wanted.length, `filtered ${found.map(message => message.body.toString())}`);
    return '16 of 24 by two tags';
  },
};

async function run(name) {
  const begin = Date.now();
  let ok = true;
  let detail;
  try {
    check(scenarios[name], 'no such scenario');
    detail = await scenarios[name]();
  } catch (error) {
    ok = false;
    detail = String(error.stack);
  }
  console.log(JSON.stringify({ scenario: name, ok, ms: Date.now() - begin, detail }));
  return ok;
}

(async () => {
  const names = chosen.length ? chosen : Object.keys(scenarios);
  const results = await Promise.all(names.map(run));
  process.exit(results.every(Boolean) ? 0 : 1);
})();
